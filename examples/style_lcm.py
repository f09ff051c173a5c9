"""A style LoRA on a full latent consistency model."""

import typer

import calotype


def main(
    prompt: str = "papercut, a cute fox",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    unet: str = "latent-consistency/lcm-sdxl",
    style: str = "TheLastBen/Papercut_SDXL",
    weight_name: str = "papercut.safetensors",
    size: int = 1024,
    out: str = "style_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet)
    engine.add_lora(style, weight_name=weight_name)
    result = engine(prompt, steps=4, guidance=8.0, seed=0, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
