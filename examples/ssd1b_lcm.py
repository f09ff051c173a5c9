"""SSD-1B, half of SDXL's size, as a full latent consistency model."""

import typer

import calotype


def main(
    prompt: str = "a lighthouse keeper reading at his window, oil painting",
    model: str = "segmind/SSD-1B",
    unet: str = "latent-consistency/lcm-ssd-1b",
    size: int = 1024,
    out: str = "ssd1b_lcm.png",
) -> None:
    engine = calotype.load(model, unet=unet)
    result = engine(prompt, steps=4, guidance=8.0, seed=0, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
