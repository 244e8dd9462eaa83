"""How fast LIBERO steps, beside the stock environment: python benchmarks/libero.py [--suites spatial,object]

Prints JSON. Both sides in one run on the same cores, with the same actions and two cameras. The stock
environment draws both pictures after every action, as RLinf and SimpleVLA-RL use it, in one process and in
two (the better counts); ours draws them once a chunk. A step is one action executed in one environment.
Bounds, on the same cores and threads: the C engine alone, stepping the same worlds without a controller, and
the renderer alone, drawing the same frame again. The split of our time: physics (the engine alone),
controller (what playing a chunk takes beyond that), render, and copy (all else: poses, arrays, records).
Tries: 8 chunks tried from where each world stands and everything put back, with the dense reward, beside the
engine alone as it steps the worlds that are tried; with all slots in one task, and spread over the suite.
With --gpu: the renderer on a card, and MuJoCo Warp's physics there against the C engine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file is called as the package is that it measures, and its folder comes first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from rove.config.schema import LiberoConfig  # noqa: E402
from rove.envs.libero import package  # noqa: E402
from rove.envs.libero.controller import SUBSTEPS  # noqa: E402
from rove.envs.libero.env import LiberoEnv  # noqa: E402
from rove.envs.libero.scenes import load_task  # noqa: E402
from rove.types import EpisodeSpec  # noqa: E402

RATIOS = {256: 10.0, 128: 20.0, 64: 30.0, 0: 6.0}
"""Steps a second over the stock environment's, by picture size; 0: states only."""
OF_BOUND = 0.85
RESET_MS = 5.0
BRANCHES = 8
"""Chunks tried from each state."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "mujoco": mujoco.__version__,
    }


def actions(steps: int, seed: int = 0) -> np.ndarray:
    """float [steps, 7]: both sides execute these, from the first on, over and over."""
    rng = np.random.default_rng(seed)
    chosen = rng.uniform(-0.5, 0.5, (steps, 7))
    chosen[:, 6] = np.where(rng.uniform(size=steps) < 0.5, -1.0, 1.0)
    return chosen


# --- the stock environment ------------------------------------------------------------------------


def stock_process(task: str, size: int, steps: int) -> None:
    """What a stock process does; prints steps a second. `size` 0: states only."""
    from libero.libero.envs.env_wrapper import ControlEnv

    pictures = {"camera_heights": size, "camera_widths": size} if size else {"use_camera_obs": False}
    env = ControlEnv(
        bddl_file_name=str(package.bddl(task)),
        has_offscreen_renderer=bool(size),
        ignore_done=True,
        **pictures,
    )
    env.seed(0)
    env.reset()
    env.set_init_state(load_task(task).initial_states[0])
    chosen = actions(steps + 5)
    for action in chosen[:5]:
        env.step(action)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for action in chosen[5:]:
        env.step(action)
    print(steps / (time.perf_counter() - start), flush=True)


def stock(task: str, size: int, steps: int, processes: int) -> float:
    """Steps a second of that many stock processes together."""
    command = [sys.executable, __file__, "--stock", task, "--sizes", str(size), "--stock-steps", str(steps)]
    environment = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for _ in range(processes)
    ]
    rates = []
    for process in running:
        while (line := process.stdout.readline()) and line.strip() != "ready":  # type: ignore[union-attr]
            pass
    for process in running:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in running:
        rates.append(float(process.stdout.readline() or "nan"))  # type: ignore[union-attr]
        process.wait()
    return sum(rates)


# --- ours -----------------------------------------------------------------------------------------


def timed(owner: Any, name: str, seconds: Counter[str]) -> None:
    """Add the wall time of a method to `seconds[name]` whenever it is called."""
    call = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def repeated(work: Callable[[], Any], repeats: int) -> list[float]:
    """Wall seconds of each but the first call, which warms caches up."""
    took = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return took[1:]


def ours(suite: str, size: int, num_envs: int, chunk: int, chunks: int, repeats: int) -> dict[str, Any]:
    """One suite at one size: rate, bounds, split, reset."""
    config = LiberoConfig(
        tasks=suite,
        image_size=size or 64,
        renderer="warp" if size else "none",
        horizon=1_000_000,
    )
    env = LiberoEnv(config, num_envs, chunk, "refill")
    task = env.suite.tasks[0]
    episodes = [EpisodeSpec(task, i % 40) for i in range(num_envs)]
    env.reset(episodes)
    reset = statistics.median(repeated(lambda: env.reset(episodes), repeats)) if not size else None
    per_chunk = torch.from_numpy(actions(chunk).astype(np.float32)).expand(num_envs, chunk, 7).contiguous()
    seconds: Counter[str] = Counter()
    timed(env, "play", seconds)
    scene = None
    if env._pictures is not None:
        scene = next(iter(env._pictures._scenes.values()))
        timed(scene._renderer, "render", seconds)
    env.step_chunk(per_chunk)
    walls, plays, renders, engines, alone = [], [], [], [], []
    for _ in range(repeats):  # in turn, so that a busy moment of the machine hits all
        seconds.clear()
        start = time.perf_counter()
        for _ in range(chunks):
            env.step_chunk(per_chunk)
        walls.append((time.perf_counter() - start) / chunks)
        plays.append(seconds["play"] / chunks)
        renders.append(seconds["render"] / chunks)
        engines.append(engine_alone(env))
        alone.append(renderer_alone(env) if scene is not None else 0.0)
    env.close()
    wall, play, render, engine, renderer = (
        statistics.median(values) for values in (walls, plays, renders, engines, alone)
    )
    steps = num_envs * chunk
    result = {
        "steps_per_second": round(steps / wall, 1),
        "repeats": [round(steps / w, 1) for w in walls],
        "bound": round(steps / (engine + renderer), 1),
        "of_bound": round(
            statistics.median((e + r) / w for e, r, w in zip(engines, alone, walls, strict=True)), 3
        ),
        "engine_alone": round(steps / engine, 1),
        "frames_per_second_alone": round(2 * num_envs / renderer, 1) if renderer else None,
        "ms_per_chunk": {
            "physics": ms(engine),
            "controller": ms(play - engine),
            "render": ms(render),
            "copy": ms(wall - play - render),
        },
    }
    if reset is not None:
        result["reset_ms_per_world"] = ms(reset / num_envs)
    return result


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def tried(suite: str, num_envs: int, chunk: int, repeats: int, *, spread: bool) -> dict[str, Any]:
    """Steps a second of tries, and the engine's; `spread` over all tasks of the suite, else of its first."""
    config = LiberoConfig(tasks=suite, renderer="none", horizon=1_000_000, scenes=32, reward="shaped")
    env = LiberoEnv(config, num_envs, chunk, "refill")
    tasks = env.suite.tasks if spread else env.suite.tasks[:1]
    env.reset([EpisodeSpec(tasks[i % len(tasks)], i % 40) for i in range(num_envs)])
    chosen = torch.from_numpy(actions(chunk * BRANCHES).astype(np.float32).reshape(1, BRANCHES, chunk, 7))
    chosen = chosen.expand(num_envs, -1, -1, -1).contiguous()
    env.try_chunks(chosen)
    walls, engines = [], []
    for _ in range(repeats):  # in turn, so that a busy moment of the machine hits both
        start = time.perf_counter()
        env.try_chunks(chosen)
        walls.append(time.perf_counter() - start)
        engines.append(BRANCHES * engine_alone(env))
    env.close()
    steps = num_envs * chunk * BRANCHES
    wall, engine = statistics.median(walls), statistics.median(engines)
    of_engine = statistics.median(e / w for e, w in zip(engines, walls, strict=True))
    return {
        "scenes": len({load_task(task).scene.key for task in tasks}),
        "steps_per_second": round(steps / wall, 1),
        "engine_alone": round(steps / engine, 1),
        "of_engine": round(of_engine, 3),
        "passed": of_engine >= OF_BOUND,
    }


def engine_alone(env: LiberoEnv) -> float:
    """Seconds for as many substeps as a chunk has, of the same worlds on the same threads; no controller."""
    groups = {id(place.group): place.group for place in env.worlds.places if place is not None}.values()
    before = [group.batch.state.copy() for group in groups]

    def work(group: Any, slots: np.ndarray, rows: np.ndarray) -> None:
        for _ in range(env.chunk):
            group.batch.step(rows, SUBSTEPS)

    start = time.perf_counter()
    env.worlds.run(range(env.num_envs), work)
    took = time.perf_counter() - start
    for group, state in zip(groups, before, strict=True):
        group.batch.state[...] = state
        group.batch.forward(stage=mujoco.mjtStage.mjSTAGE_VEL.value)
    return took


def renderer_alone(env: LiberoEnv) -> float:
    """Seconds to draw all worlds from frames at hand, in pieces as the environment draws them."""
    assert env._pictures is not None
    frames: list[Any] = []
    renderer = next(iter(env._pictures._scenes.values()))._renderer
    render = renderer.render
    renderer.render = lambda frame: (frames.append(frame), render(frame))[1]
    env._draw(range(env.num_envs))
    renderer.render = render
    start = time.perf_counter()
    for frame in frames:
        render(frame)
    return time.perf_counter() - start


# --- a card ---------------------------------------------------------------------------------------


def gpu(task: str, sizes: list[int], worlds: int) -> dict[str, Any] | str:
    """The renderer on CUDA, and MuJoCo Warp's physics there against the C engine from the same states."""
    import warp as wp

    from rove.envs.libero.frame import LiberoFrame
    from rove.envs.libero.render import LiberoRenderer
    from rove.envs.libero.scenes import CAMERAS

    if not wp.get_cuda_device_count():
        return "not run: no CUDA device"
    import mujoco_warp

    loaded = load_task(task)
    model = loaded.scene.looks()
    data = mujoco.MjData(model)
    sites = np.array([model.site(burner["site"]).id for burner in loaded.burners], int)
    data.qpos[:] = loaded.initial_states[0][1 : 1 + model.nq]
    mujoco.mj_step(model, data, 300)  # until the objects rest
    one = LiberoFrame.of(data, sites, np.zeros(len(sites), bool))
    result: dict[str, Any] = {
        "device": wp.get_device("cuda:0").name,
        "worlds": worlds,
        "frames_per_second": {},
    }
    for size in sizes:
        renderer = LiberoRenderer(
            model, worlds, cameras=CAMERAS, size=size, burners=sites.tolist(), device="cuda:0"
        )
        frame = LiberoFrame.stack([one] * worlds)
        seconds = statistics.median(repeated(lambda r=renderer, f=frame: r.render(f), 5))
        result["frames_per_second"][size] = round(2 * worlds / seconds)
        renderer.close()
    substeps = 100
    with wp.ScopedDevice("cuda:0"):
        m = mujoco_warp.put_model(model)
        d = mujoco_warp.put_data(model, data, nworld=worlds, nconmax=512, njmax=2048)
        with wp.ScopedCapture() as capture:
            mujoco_warp.step(m, d)
        start = time.perf_counter()
        for _ in range(substeps):
            wp.capture_launch(capture.graph)
        wp.synchronize()
        took = time.perf_counter() - start
        qpos = d.qpos.numpy()[0]
    mujoco.mj_step(model, data, substeps)
    start = time.perf_counter()
    mujoco.mj_step(model, data, substeps)
    alone = time.perf_counter() - start
    result["physics"] = {
        "warp_substeps_per_second": round(worlds * substeps / took),
        "c_substeps_per_second_per_core": round(substeps / alone),
        "largest_difference_after_100_substeps": float(np.abs(qpos - data.qpos).max()),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", default="spatial,object,goal,10,90")
    parser.add_argument("--sizes", default="256,128,64,0", help="pixels; 0: states only")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=4, help="chunks a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stock-steps", type=int, default=24)
    parser.add_argument("--only-tries", action="store_true", help="nothing beside the tries")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--stock", metavar="TASK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.stock:
        stock_process(args.stock, sizes[0], args.stock_steps)
        return
    report: dict[str, Any] = {
        "benchmark": "LIBERO environment steps",
        "num_envs": args.num_envs,
        "chunk": args.chunk,
        "cameras": 2,
        "machine": machine(),
        "suites": {},
        "bars": {"over_stock": RATIOS, "of_bound": OF_BOUND, "reset_ms_per_world": RESET_MS},
    }
    for suite in args.suites.split(","):
        task = package.tasks(suite)[0]
        cases: dict[str | int, Any] = {"task": task}
        report["suites"][suite] = cases
        cases["tries"] = {
            "one task" if not spread else "all tasks": tried(
                suite, args.num_envs, args.chunk, args.repeats, spread=spread
            )
            for spread in (False, True)
        }
        print(f"{suite} tries: {json.dumps(cases['tries'])}", file=sys.stderr, flush=True)
        for size in [] if args.only_tries else sizes:
            rates = {count: stock(task, size, args.stock_steps, count) for count in (1, 2)}
            case = ours(suite, size, args.num_envs, args.chunk, args.chunks, args.repeats)
            case["stock"] = {f"{count} processes": round(rate, 2) for count, rate in rates.items()}
            case["over_stock"] = round(case["steps_per_second"] / max(rates.values()), 1)
            case["passed"] = case["over_stock"] >= RATIOS.get(size, 0) and case["of_bound"] >= OF_BOUND
            cases[size or "states only"] = case
            print(f"{suite} {size}: {json.dumps(case)}", file=sys.stderr, flush=True)
    pixels = [size for size in sizes if size]
    report["gpu"] = gpu(package.tasks("spatial")[0], pixels, 256) if args.gpu else "not run: needs --gpu"
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
