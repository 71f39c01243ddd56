"""`jaxsys ground`: language grounding with 3D objects, from meshes to a report."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.cli.ground_run import EvaluateCommand, TrainCommand, run_evaluate, run_train
from jaxsys.cli.options import Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrepareCommand(Output):
    """Draw furniture libraries from all around and encode the views: what the game is played with.

    `apt-get download sweethome3d-furniture sweethome3d` gets the libraries as two .deb files on
    Debian and its kin; name them after --libraries. A run that was stopped goes on.

    Attributes:
      libraries: .deb, .sh3f or .jar files, or folders that hold some.
      out: Folder for catalogue, views and features; made if need be.
      views: Number of views of each object, evenly around it.
      size: Side of a view in pixels.
      elevation: Of the camera above the ground, degrees.
      light: Direction to the light: to the right of, above and towards the camera.
      drop: Categories that are left out.
      most: Of each library the first so many objects only.
      encoder: efficientnet-lite0 (of the extra ground), clip:PATH, or none for the views alone.
      activations: Also keep what the encoder's last blocks read, which DA4LG adapts.
    """

    out: Path
    libraries: tuple[Path, ...] = ()
    views: int = 8
    size: int = 160
    elevation: float = 30.0
    light: tuple[float, float, float] = (-0.4, 0.7, 0.6)
    drop: tuple[str, ...] = ("Characters", "Doors and windows", "Staircases")
    most: int | None = None
    encoder: str = "efficientnet-lite0"
    activations: bool = False


def run_prepare(config: PrepareCommand) -> dict[str, Any]:
    """Say how many objects there are, and which could not be read."""
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.ground.features import image_encoder
    from jaxsys.ground.prepared import PrepareConfig, prepare_features, prepare_views
    from jaxsys.ground.render import RenderConfig

    drawing = RenderConfig(
        views=config.views, size=config.size, elevation_deg=config.elevation, light=config.light
    )
    # Weights that are missing are told of before anything is drawn.
    encoder = None if config.encoder == "none" else image_encoder(config.encoder)
    if encoder is None and config.activations:
        raise UserError("--activations come from an encoder and --encoder is none; name one")
    chosen = PrepareConfig(drawing, config.drop, config.most)
    with progress_bar("drawing") as progress:
        done = prepare_views(config.libraries, config.out, chosen, progress=progress)
    encoded = 0
    if encoder is not None:
        with progress_bar(f"encoding by {config.encoder}") as progress:
            encoded = prepare_features(
                config.out, encoder, activations=config.activations, progress=progress
            )
    for one in done.refused:
        print(f"left out: {one.key} of {one.library}: {one.why}", file=sys.stderr)
    if not config.json:
        print(
            f"{config.out}: {len(done.catalogue.objects)} objects, {done.drawn} drawn and "
            f"{encoded} encoded now, {len(done.refused)} left out (refused.jsonl)"
        )
    return {
        "objects": len(done.catalogue.objects),
        "drawn": done.drawn,
        "encoded": encoded,
        "refused": [one._asdict() for one in done.refused],
        "out": str(config.out),
    }


COMMANDS = {
    "prepare": (PrepareCommand, run_prepare),
    "train": (TrainCommand, run_train),
    "evaluate": (EvaluateCommand, run_evaluate),
}
