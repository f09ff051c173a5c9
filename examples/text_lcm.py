"""Text to image with a full latent consistency model: SDXL with a U-Net that has the guidance embedded."""

import typer

import calotype


def main(
    prompt: str = "a lighthouse keeper reading at his window, oil painting",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    unet: str = "latent-consistency/lcm-sdxl",
    variant: str = "fp16",
    size: int = 1024,
    out: str = "text_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet, variant=variant or None)
    result = engine(prompt, steps=4, guidance=8.0, seed=0, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
