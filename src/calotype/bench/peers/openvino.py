"""OpenVINO: diffusers' pipeline, its U-Net and decoder converted and compiled for one size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.bench.peer import Clock, Draw
from calotype.bench.peers import diffusers as pipelines
from calotype.bench.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def prepare(task: Task) -> None:
    """Converts the networks, once; the files stay in the scratch folder."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        task.folder, torch_dtype=torch.float32, variant=task.variant, local_files_only=True
    )
    pipelines.arrange(pipeline, task)
    unet, decoder = pipeline.unet, pipeline.vae.decoder
    latents = torch.randn(1, unet.config.in_channels, *_latent_size(task, pipeline))
    given: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        ids = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - ids
        given = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}
    if unet.config.time_cond_proj_dim is not None:
        given["timestep_cond"] = torch.randn(1, unet.config.time_cond_proj_dim)
    context = torch.randn(1, pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim)
    _convert(_flat(unet, list(given)), (latents, torch.tensor([999]), context, *given.values()), _unet(task))
    _convert(decoder, (torch.randn(1, 4, *latents.shape[2:]),), _decoder(task))


def load(task: Task, clock: Clock) -> Draw:
    with clock("import"):
        import openvino
        import torch
        from diffusers import DiffusionPipeline, UNet2DConditionModel
    torch.set_num_threads(task.threads)
    with clock("load"):
        core = openvino.Core()
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[task.dtype],
            "INFERENCE_NUM_THREADS": task.threads,
        }
        with torch.device("meta"):  # its weights are in the compiled network
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(task.folder, subfolder="unet"))
        pipeline = DiffusionPipeline.from_pretrained(
            task.folder, unet=unet, torch_dtype=torch.float32, variant=task.variant, local_files_only=True
        )
        pipelines.arrange(pipeline, task)
        run = core.compile_model(_unet(task), "CPU", hints)
        decode = core.compile_model(_decoder(task), "CPU", hints)
        unet.forward = _called(run)
        pipeline.vae.decoder.forward = lambda z, *_: _output(decode, (z,))
    pipelines.watch(pipeline, clock)
    return pipelines.drawing(pipeline, task)


def _unet(task: Task) -> Path:
    return Path(task.scratch, f"unet-{task.width}x{task.height}.xml")


def _decoder(task: Task) -> Path:
    return Path(task.scratch, f"decoder-{'full' if task.tiny_vae is None else 'tiny'}-{task.width}x{task.height}.xml")


def _latent_size(task: Task, pipeline: Any) -> tuple[int, int]:
    return task.height // pipeline.vae_scale_factor, task.width // pipeline.vae_scale_factor


def _flat(unet: Any, names: list[str]) -> nn.Module:
    """A U-Net whose arguments are tensors alone, as a converter needs them."""
    from torch import nn

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, context: Tensor, *rest: Tensor) -> Tensor:
            given = dict(zip(names, rest, strict=True))
            w = given.pop("timestep_cond", None)
            out: Tensor = self.unet(x, t, context, timestep_cond=w, added_cond_kwargs=given, return_dict=False)[0]
            return out

    return Flat()


def _convert(network: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    import openvino
    import torch

    if path.is_file():
        return
    with torch.no_grad():
        model = openvino.convert_model(network.eval(), example_input=example, input=[each.shape for each in example])
    openvino.save_model(model, path, compress_to_fp16=True)


def _called(run: Any) -> Any:
    def forward(x: Tensor, t: Tensor, **given: Any) -> tuple[Tensor]:
        added = given.get("added_cond_kwargs") or {}
        rest = [added[name] for name in ("text_embeds", "time_ids") if name in added]
        if given.get("timestep_cond") is not None:
            rest.append(given["timestep_cond"])
        return (_output(run, (x, t.reshape(1), given["encoder_hidden_states"], *rest)),)

    return forward


def _output(run: Any, given: tuple[Tensor, ...]) -> Tensor:
    import torch

    return torch.from_numpy(run([each.numpy() for each in given])[0].copy())
