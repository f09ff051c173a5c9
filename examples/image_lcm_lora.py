"""Image to image with an LCM-LoRA."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "a castle above a misty valley, matte painting",
    model: str = "Lykon/dreamshaper-7",
    lora: str = "latent-consistency/lcm-lora-sdv1-5",
    size: int = 512,
    out: str = "image_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora)
    picture = calotype.open_image(photo)
    settings = {"sampler": "lcm", "steps": 4, "guidance": 1.0, "seed": 0}
    result = engine(prompt, image=picture, strength=0.6, width=size, height=size, resize="crop", **settings)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
