"""Compiles LIBERO's scenes with stock robosuite, in a process of its own.

Here alone is robosuite run. What it answers goes to the cache (`scenes.py`): two models for each scene, and
for each task its initial states, where each of the published resets puts the fixtures, what a reset draws,
and its goal, as numbers.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from rove.envs.libero import package, scenes
from rove.errors import RoveError

LARGEST_TEXTURE = 2048
"""Textures at least this large on their shorter side are halved until they are smaller. Seen from LIBERO's
cameras many texels of the 4096-pixel textures share a pixel: OpenGL would read a later level of its mip map,
which is this very picture, and a renderer without mip maps would alias."""


def build(task: str, folder: Path) -> None:
    """Write the files of one task, and of its scene unless it is there already."""
    from libero.libero.envs.env_wrapper import ControlEnv

    env = ControlEnv(
        bddl_file_name=str(package.bddl(task)), has_offscreen_renderer=False, use_camera_obs=False
    ).env
    states, placement = package.initial_states(task), _placement(env)
    poses = _fixture_poses(env, len(states))
    key = _scene(env, folder)
    about = {
        "scene": key,
        "bytes": [(folder / file).stat().st_size for file in scenes.scene_files(key)],
        "fixtures": [fixture.root_body for fixture in env.fixtures],
        "goal": [_predicate(env, task, goal) for goal in env.parsed_problem["goal_state"]],
        "burners": list(_burners(env)),
        "placement": placement,
        "objects": {name: body.root_body for name, body in (env.objects_dict | env.fixtures_dict).items()},
    }
    file = io.BytesIO()
    np.savez_compressed(file, states=states, poses=poses, about=json.dumps(about))
    scenes.write(folder / scenes.task_file(task), file.getvalue())


# --- where the fixtures stand ---------------------------------------------------------------------


def _fixture_poses(env: Any, count: int) -> np.ndarray:
    """Return [count, fixtures, 7], position and quaternion of each fixture after the 1st, 2nd, … reset.

    Published evaluations seed NumPy's global generator with 0, then reset once for each episode: episode i is
    played on initial state i, but with its fixtures where reset i + 1 has put them. A stock reset compiles
    the scene anew, which decides nothing here: what counts is how many numbers each reset draws. For doors
    and drawers each draws again all that those before it drew.
    """
    from robosuite.utils.errors import RandomizationError

    model, drawn = env.sim.model, list(env.object_property_initializers)
    bodies = [model.body_name2id(fixture.root_body) for fixture in env.fixtures]
    position, quaternion = model.body_pos.copy(), model.body_quat.copy()
    poses = np.zeros((count, len(bodies), 7))
    # In its default posture everything lies in one heap, whose contacts take long and move no fixture.
    flags = model.opt.disableflags
    model.opt.disableflags = flags | mujoco.mjtDisableBit.mjDSBL_CONTACT
    np.random.seed(0)  # noqa: NPY002 (the generator that robosuite draws from)
    resets = 1
    for i in range(count):
        placed = False
        while not placed:
            resets += 1
            env.object_property_initializers = drawn * resets
            model.body_pos[:], model.body_quat[:] = position, quaternion
            env.sim.reset()
            try:
                env._reset_internal()
                placed = True
            except RandomizationError:  # no room was found; the stock environment tries again, too
                continue
        poses[i] = np.concatenate([model.body_pos[bodies], model.body_quat[bodies]], axis=1)
    model.body_pos[:], model.body_quat[:] = position, quaternion
    model.opt.disableflags = flags
    return poses


def _placement(env: Any) -> dict[str, Any]:
    """Describe what a reset draws, in its order, as the data that `placement.py` reads."""
    joints = []
    for drawn in env.object_property_initializers:
        site = env.object_sites_dict.get(drawn.name)
        names = site.joints if site else env.get_object(drawn.name).joints
        joints.append({"joints": list(names), "range": [float(end) for end in drawn.joint_ranges]})
    things = []
    for composite in (
        env.placement_initializer,
        env.conditional_placement_initializer,
        env.conditional_placement_on_objects_initializer,
    ):
        for sampler, arguments in zip(
            composite.samplers.values(), composite.sample_args.values(), strict=True
        ):
            things += [_thing(env, sampler, thing, arguments or {}) for thing in sampler.mujoco_objects]
    return {"joints": joints, "things": things}


def _thing(env: Any, sampler: Any, thing: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Describe where a reset puts one thing."""
    from libero.libero.envs.regions import InSiteRegionRandomSampler, MultiRegionRandomSampler

    inside = isinstance(sampler, InSiteRegionRandomSampler)
    bounded = sampler.ensure_object_boundary_in_range and not inside
    rotation, axis = sampler.rotation, sampler.rotation_axis
    if rotation is None:
        turns = [[axis, 0.0, 2 * np.pi]]
    elif isinstance(rotation, dict):
        turns = [[axis, float(min(ends)), float(max(ends))] for axis, ends in rotation.items()]
    elif isinstance(rotation, (tuple, list)):
        turns = [[axis, float(min(rotation)), float(max(rotation))]]
    else:
        turns = [[axis, float(rotation)]]
    start = getattr(thing, "init_quat", None)
    return {
        "name": thing.name,
        "body": thing.root_body,
        "joint": None if env.is_fixture(thing.name) else thing.joints[-1],
        "ranges": [
            [float(end) for end in (*x, *y)] for x, y in zip(sampler.x_ranges, sampler.y_ranges, strict=True)
        ],
        "margin": float(thing.horizontal_radius) if bounded else 0.0,
        "turns": turns,
        "first": type(sampler) is MultiRegionRandomSampler,
        "start": None if start is None else [float(number) for number in start],
        "radius": float(thing.horizontal_radius),
        "bottom": float(thing.bottom_offset[-1]),
        "top": float(thing.top_offset[-1]),
        "apart": bool(sampler.ensure_valid_placement),
        "origin": [float(number) for number in sampler.reference_pos],
        "above": float(sampler.z_offset),
        "reference": arguments.get("reference"),
        "stacked": not inside,
        "site": arguments.get("site_name"),
    }


# --- the scene ------------------------------------------------------------------------------------


def _scene(env: Any, folder: Path) -> str:
    """Compile the environment's scene unless the cache has it; returns its key.

    The areas of the table that a goal names are invisible sites and the only difference between many tasks:
    without them, the 130 tasks share 32 scenes. `_predicate` keeps what is known of them.
    """
    tree = ElementTree.fromstring(env.model.get_xml())
    zones = {name for name, site in env.object_sites_dict.items() if site.parent_name is None}
    for parent in tree.iter():
        for site in [child for child in parent if child.tag == "site" and child.get("name") in zones]:
            parent.remove(site)
    text = ElementTree.tostring(tree, encoding="unicode")
    places = {str(Path(path).resolve()) for path in sys.path if path}
    for place in sorted(places, key=len, reverse=True):  # where the package lies says nothing of the scene
        text = text.replace(place, "")
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    physics, looks = (folder / file for file in scenes.scene_files(key))
    if not (physics.is_file() and looks.is_file()):
        with tempfile.TemporaryDirectory() as scratch:
            _prepare_textures(tree, Path(scratch))
            _shrink_arena(tree)
            model = mujoco.MjModel.from_xml_string(ElementTree.tostring(tree, encoding="unicode"))
        _hide_sites(env, model)
        _save(model, looks)
        _discard_looks(tree)
        _save(mujoco.MjModel.from_xml_string(ElementTree.tostring(tree, encoding="unicode")), physics)
    return key


def _save(model: mujoco.MjModel, path: Path) -> None:
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    scenes.write(path, buffer.tobytes())


def _discard_looks(tree: ElementTree.Element) -> None:
    """Have the compiler leave out what is only seen: the dynamics are the same, in a tenth of the memory, of
    which each batch of worlds has a copy."""
    compiler = tree.find("compiler")
    if compiler is None:
        compiler = ElementTree.SubElement(tree, "compiler")
    compiler.set("discardvisual", "true")


def _prepare_textures(tree: ElementTree.Element, scratch: Path) -> None:
    """Halve large textures, and read all of them the way that MuJoCo did before 3.3.3: as they are.

    Newer versions take the colours of files that say they are sRGB for linear light, and OpenGL then shows
    them much darker than the pictures that published policies were trained on.
    """
    from PIL import Image

    done: dict[str, str] = {}
    for texture in tree.iter("texture"):
        texture.set("colorspace", "linear")
        if (file := texture.get("file")) is None or texture.get("type") != "2d":
            continue
        if file not in done:
            done[file] = file
            with Image.open(file) as image:
                halvings = 0
                while min(image.size) >> halvings >= LARGEST_TEXTURE:
                    halvings += 1
                if halvings:
                    done[file] = str(scratch / f"{len(done)}.png")
                    image.convert("RGB").reduce(1 << halvings).save(done[file], compress_level=1)
        texture.set("file", done[file])


def _shrink_arena(tree: ElementTree.Element) -> None:
    """Make a world reserve 64 MB for contacts in place of 1.3 GB; 700 constraints, the most seen, take 3."""
    for size in tree.iter("size"):
        size.attrib.clear()
        size.set("memory", "64M")


def _hide_sites(env: Any, model: mujoco.MjModel) -> None:
    """Colour the sites as after a stock reset, which hides the markers of objects and hand."""
    env.visualize(vis_settings=dict.fromkeys(env._visualizations, False))
    env._post_process()
    for i in range(model.nsite):
        model.site_rgba[i] = env.sim.model.site_rgba[env.sim.model.site_name2id(model.site(i).name)]


def _burners(env: Any) -> Iterable[dict[str, Any]]:
    """Describe the sites that are seen only while a knob is turned: their name, the knob's joint, and from
    where on."""
    for name, fixture in env.fixtures_dict.items():
        for site, _ in fixture.object_properties["vis_site_names"].values():
            limits = fixture.object_properties["articulation"]["default_turnon_ranges"]
            comparison, limit = _threshold(fixture.turn_on, limits)
            joints = env.get_object(name).joints
            yield {"site": site, "joints": joints, "comparison": comparison, "limit": limit}


# --- the goal -------------------------------------------------------------------------------------


def _predicate(env: Any, task: str, goal: list[str]) -> dict[str, Any]:
    """Describe one predicate as the data that `predicates.py` reads."""
    name, *arguments = goal
    if name in ("open", "close", "turnon", "turnoff"):
        return _joint_predicate(env, name, arguments[0])
    if name in ("in", "on"):
        thing, target = arguments
        body = env.objects_dict[thing]
        geoms = sorted(body.contact_geoms)
        if target in env.object_sites_dict:
            site = env.object_sites_dict[target]
            parent = env.get_object(site.parent_name)
            return {
                "kind": f"{name}_region",
                "body": body.root_body,
                "region": _region(env, target, np.asarray(site.size, float)),
                "touching": [geoms, sorted(parent.contact_geoms)] if parent and name == "on" else None,
            }
        if name == "on":
            other = env.get_object(target)
            return {
                "kind": "on_object",
                "body": body.root_body,
                "other": other.root_body,
                "touching": [geoms, sorted(other.contact_geoms)],
            }
    raise RoveError(
        f"{task}: the goal {goal} is none of on, in, open, close, turnon and turnoff, all that LIBERO's own "
        "tasks ask for. Leave the task out, or describe this kind in envs/libero/build.py and predicates.py."
    )


def _region(env: Any, name: str, size: np.ndarray) -> dict[str, Any]:
    """Describe a box on a body: where it is in the body's frame, and its half sizes, metres."""
    model = env.sim.model
    site = model.site_name2id(name)
    return {
        "body": model.body_id2name(model.site_bodyid[site]),
        "position": model.site_pos[site].tolist(),
        "quaternion": model.site_quat[site].tolist(),
        "size": size.tolist(),
    }


def _joint_predicate(env: Any, name: str, target: str) -> dict[str, Any]:
    site = env.object_sites_dict.get(target)
    thing = env.get_object(site.parent_name if site else target)
    joints = site.joints if site else thing.joints
    test = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}[name]
    limits = thing.object_properties["articulation"][f"default_{name}_ranges"]
    comparison, limit = _threshold(getattr(thing, test), limits)
    return {
        "kind": "joint",
        "joints": list(joints),
        "comparison": comparison,
        "limit": limit,
        "all": name in ("close", "turnoff"),
    }


def _threshold(test: Callable[[float], bool], limits: list[float]) -> tuple[str, float]:
    """Return the comparison ("<", "<=", ">" or ">=") and the number that joint positions pass by."""
    for limit in limits:
        below, at, above = (bool(test(limit + offset)) for offset in (-1e-9, 0.0, 1e-9))
        if below != above:
            return ("<" if below else ">") + ("=" if at else ""), float(limit)
    raise RoveError(f"{test} does not change at any of the joint limits {limits}: is this a stock LIBERO?")


# --- the process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Import robosuite in here, and it loads neither OpenCV nor OpenGL, which many a machine has no libraries
    for; nor does it open a log file in /tmp, which may be another user's."""
    package = importlib.util.find_spec("robosuite")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert spec is not None and spec.loader is not None
    macros = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.MUJOCO_GPU_RENDERING, macros.FILE_LOGGING_LEVEL = False, None
    opencv, display = sys.modules.get("cv2"), os.environ.get("MUJOCO_GL")
    sys.modules["cv2"], os.environ["MUJOCO_GL"] = types.ModuleType("cv2"), "disable"
    try:
        yield
    finally:
        del sys.modules["cv2"], os.environ["MUJOCO_GL"]
        if opencv is not None:
            sys.modules["cv2"] = opencv
        if display is not None:
            os.environ["MUJOCO_GL"] = display


class Compiler:
    """Compiles tasks, in a process of its own, which robosuite and LIBERO may print in unheard."""

    def __init__(self) -> None:
        unheard = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(unheard, stream)
        with without_pictures():
            import libero.libero.envs.env_wrapper  # noqa: F401

    def build(self, task: str, folder: Path) -> None:
        """Write the files of one task, as the function `build` does."""
        build(task, folder)
        gc.collect()  # an environment refers to itself, and takes 80 MB

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
