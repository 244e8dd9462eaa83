"""Public sources of the put-on-plate suite's data; see `rove.envs.downloads`."""

from __future__ import annotations

from rove.envs.downloads import Archive

_RL4VLA = "55f966d"
_GROUPS = ("more_carrot", "more_plate", "more_table")
_CARROT = "ManiSkill/mani_skill/assets/carrot/"


def archives() -> tuple[Archive, ...]:
    """Robot, scene, and the objects, receptacles and tables.

    The first two are the archives that ManiSkill itself would download, with the checksum that it publishes.
    """
    return (
        Archive(
            "robot",
            "https://github.com/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip",
            (("*/", "data/robots/widowx/"),),
            ("data/robots/widowx/wx250s.urdf",),
            terms="No licence is stated.",
        ),
        Archive(
            "scene",
            "https://huggingface.co/datasets/haosulab/ManiSkill_bridge_v2_real2sim/resolve/main/"
            "bridge_v2_real2sim_dataset.zip",
            (("bridge_v2_real2sim_dataset/", "data/tasks/bridge_v2_real2sim_dataset/"),),
            ("data/tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb",),
            sha256="618512a205b4528cafecdad14b1788ed1130879f3064deb406516ed5b9c5ba92",
            terms="Apache-2.0.",
        ),
        Archive(
            "objects",
            f"https://github.com/gen-robot/RL4VLA/archive/{_RL4VLA}.zip",
            ((f"*/{_CARROT}", "data/tasks/carrot/"),),
            tuple(
                f"data/tasks/carrot/{group}/model_db.json"
                for group in ("more_carrot", "more_plate", "more_table")
            ),
            terms="CC BY-NC 4.0 by its folder's README: research only.",
        ),
    )
