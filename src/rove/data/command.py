"""What `rove data` does: the arguments of the command line in, lines of text out."""

from __future__ import annotations

import json
from pathlib import Path

from rove.data import lerobot
from rove.data import show as showing
from rove.data.exporting import export as write_data_set
from rove.data.importing import ImportOptions, import_recording, read_spec
from rove.data.recording import open_recording
from rove.envs import conventions
from rove.envs import registry as envs
from rove.errors import RoveError
from rove.preflight import can_write
from rove.reporting.progress import beside_output
from rove.training.demonstrations import described, load_demonstrations, save_demonstrations
from rove.types import ActionSpec, Conventions


def import_(
    source: Path,
    suite: str | None,
    out: Path | None,
    images: tuple[str, ...] | None,
    state: tuple[str, ...] | None,
    action: str | None,
    actions: Path | None,
    image_size: int | None,
    every: int | None,
    fps: float | None,
    episodes: int | None,
    failures: bool,
) -> None:
    """Make demonstrations of a data set, and say what they are and how to learn from them."""
    known = _conventions(suite)
    out = out or Path(f"{source.resolve().stem}.npz")
    can_write(out, "--out")
    options = ImportOptions(
        image_size=image_size or envs.configure(known.suite).image_size,
        images=images,
        state=() if state == ("none",) else state,
        action=action,
        action_spec=None if actions is None else _spec(actions),
        every=every or 1,
        fps=fps,
        episodes=episodes,
        failures=failures,
    )
    recording = open_recording(source)
    for line in lerobot.unfinished(source):
        print(line)
    with beside_output("import") as progress:
        made, about = import_recording(
            recording,
            known,
            options,
            on_begin=lambda count: progress.phase("read", count),
            on_episode=progress.advance,
        )
        save_demonstrations(made, out, about)
    read = about["features"]
    print(
        f"{about['episodes']} episodes ({about['left_out']} left out, which failed), {len(made)} rows of "
        f"{', '.join(read['images'])}; state: {', '.join(read['state']) or 'none'}; actions: "
        f"{read['action']}, as {known.suite} has them."
    )
    print(f"{out}: learn from it with --sft.data {out}")


def export(source: Path, suite: str | None, out: Path | None, fps: int | None) -> None:
    """Write demonstrations as a LeRobot data set."""
    made, _, _ = described(source)
    if suite is None:
        suite = made.get("suite") or made.get("env", {}).get("kind")
    known, spec = _conventions(suite), None
    if "action_spec" in made:
        spec = read_spec(made["action_spec"], str(source))
    rate = fps or made.get("fps") or known.rate
    if rate is None:
        raise RoveError(f"How many actions a second {known.suite} has is not on record: say it with --fps N.")
    out = out or Path(source.stem)
    demonstrations = load_demonstrations(source)
    with beside_output("export") as progress:
        count = 0 if demonstrations.episode is None else len(demonstrations.episode.unique())
        progress.phase("write", count)
        write_data_set(
            demonstrations,
            out,
            fps=round(rate),
            spec=spec or known.action_spec,
            suite=known.suite,
            made=made,
            on_episode=progress.advance,
        )
    print(f"{count} episodes, {len(demonstrations)} frames: {out}")


def show(source: Path, episode: int | None, out: Path | None) -> None:
    """Print what a data set holds; with `out` or `episode` draw an episode."""
    if out is not None:
        if out.suffix not in (".webp", ".gif"):
            raise RoveError(f"--out {out}: name a .webp or a .gif file.")
        can_write(out, "--out")
    recording = open_recording(source)
    for line in showing.describe(recording):
        print(line)
    if recording.lengths:
        out = out or Path(f"{source.resolve().stem}.webp")
        showing.draw(recording, episode or 0, out)
        print(f"\nepisode {episode or 0}: {out}")


def recover(source: Path) -> None:
    """Finish a recording that was cut off."""
    count = lerobot.recover(source)
    print(f"{source}: {f'an episode of {count} frames is finished' if count else 'nothing was cut off'}.")


def _conventions(suite: str | None) -> Conventions:
    if suite is None:
        raise RoveError("For which suite? Name it with --suite, e.g. --suite libero:object.")
    return conventions.of(suite)


def _spec(path: Path) -> ActionSpec:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RoveError(f"--actions {path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RoveError(f"--actions {path} holds no object: see docs/data.md.")
    return read_spec(found, str(path))
