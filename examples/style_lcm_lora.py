"""A style LoRA beside an LCM-LoRA, each with its weight."""

import typer

import calotype


def main(
    prompt: str = "papercut, a cute fox",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    lora: str = "latent-consistency/lcm-lora-sdxl",
    style: str = "TheLastBen/Papercut_SDXL",
    weight_name: str = "papercut.safetensors",
    size: int = 1024,
    out: str = "style_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora, name="lcm")
    engine.add_lora(style, name="papercut", weight_name=weight_name)
    engine.set_loras({"lcm": 1.0, "papercut": 0.8})
    result = engine(prompt, sampler="lcm", steps=4, guidance=1.0, seed=0, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
