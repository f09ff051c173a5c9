"""Inpainting with an LCM-LoRA on a U-Net made for it, of 9 channels."""

import typer

import calotype


def main(
    photo: str,
    mask: str,
    prompt: str = "a stone bench under a tree",
    model: str = "stable-diffusion-v1-5/stable-diffusion-inpainting",
    lora: str = "latent-consistency/lcm-lora-sdv1-5",
    size: int = 512,
    out: str = "inpaint_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora)
    picture, white = (calotype.open_image(file).resize((size, size)) for file in (photo, mask))  # white is repainted
    result = engine(prompt, image=picture, mask=white, sampler="lcm", steps=4, guidance=4.0, seed=0)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
