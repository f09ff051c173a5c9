"""A T2I-Adapter with an LCM-LoRA."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "a mystical dragon in the snow, 4k",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    lora: str = "latent-consistency/lcm-lora-sdxl",
    adapter: str = "TencentARC/t2i-adapter-canny-sdxl-1.0",
    size: int = 1024,
    out: str = "adapter_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora)
    engine.add_control(adapter, name="canny")
    edges = calotype.canny(calotype.open_image(photo).resize((size, size)), low=100, high=200)
    steered = [calotype.Control("canny", edges, scale=0.8)]
    result = engine(prompt, controls=steered, sampler="lcm", steps=4, guidance=1.5, seed=0)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
