"""Inpainting with a full latent consistency model; an ordinary U-Net of 4 channels will do."""

import typer

import calotype


def main(
    photo: str,
    mask: str,
    prompt: str = "a stone bench under a tree",
    model: str = "Lykon/dreamshaper-7",
    unet: str = "SimianLuo/LCM_Dreamshaper_v7",
    size: int = 512,
    out: str = "inpaint_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet)
    picture, white = (calotype.open_image(file).resize((size, size)) for file in (photo, mask))  # white is repainted
    result = engine(prompt, image=picture, mask=white, steps=4, guidance=7.5, seed=0)
    print(*result.save(out))  # what the mask leaves black is the photo's, bit for bit


if __name__ == "__main__":
    typer.run(main)
