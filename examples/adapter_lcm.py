"""A T2I-Adapter on a full latent consistency model: lighter than a ControlNet, evaluated once."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "a mystical dragon in the snow, 4k",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    unet: str = "latent-consistency/lcm-sdxl",
    adapter: str = "TencentARC/t2i-adapter-canny-sdxl-1.0",
    size: int = 1024,
    out: str = "adapter_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet)
    engine.add_control(adapter, name="canny")
    edges = calotype.canny(calotype.open_image(photo).resize((size, size)), low=100, high=200)
    steered = [calotype.Control("canny", edges, scale=0.8, end=1.0)]  # `end`: the share of the steps in which it acts
    result = engine(prompt, controls=steered, steps=4, guidance=5.0, seed=0)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
