"""Image to image with a full latent consistency model: the strength says how much of the picture may change."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "a castle above a misty valley, matte painting",
    model: str = "Lykon/dreamshaper-7",
    unet: str = "SimianLuo/LCM_Dreamshaper_v7",
    size: int = 512,
    out: str = "image_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet)
    picture = calotype.open_image(photo)
    settings = {"steps": 4, "guidance": 7.5, "seed": 0}
    result = engine(prompt, image=picture, strength=0.5, width=size, height=size, resize="crop", **settings)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
