"""A ControlNet on a full latent consistency model: the edges of a picture, drawn anew."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "the Mona Lisa",
    model: str = "SimianLuo/LCM_Dreamshaper_v7",
    control: str = "lllyasviel/sd-controlnet-canny",
    size: int = 512,
    out: str = "control_lcm.png",
) -> None:
    engine = calotype.load(model)
    engine.add_control(control, name="canny")
    picture = calotype.open_image(photo).resize((size, size))
    edges = calotype.canny(picture, low=100, high=200)
    result = engine(prompt, controls=[calotype.Control("canny", edges)], steps=4, seed=0)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
