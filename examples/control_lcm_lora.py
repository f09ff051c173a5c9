"""A ControlNet with an LCM-LoRA, at four fifths of its strength and a little guidance."""

import typer

import calotype


def main(
    photo: str,
    prompt: str = "the Mona Lisa",
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    lora: str = "latent-consistency/lcm-lora-sdv1-5",
    control: str = "lllyasviel/sd-controlnet-canny",
    size: int = 512,
    out: str = "control_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora, scale=1.0)
    engine.add_control(control, name="canny")
    edges = calotype.canny(calotype.open_image(photo).resize((size, size)), low=100, high=200)
    steered = [calotype.Control("canny", edges, scale=0.8)]
    result = engine(prompt, controls=steered, sampler="lcm", steps=4, guidance=1.5, seed=0)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
