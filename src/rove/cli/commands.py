"""The table of commands: what each is called, takes, and is carried out by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rove.cli import handlers
from rove.cli.parsing import Argument, Command
from rove.cli.values import milliseconds, names, number, whole
from rove.config.ranges import MAX_SEED

_COUNT = partial(whole, low=1)
_MACHINES = partial(whole, low=1, high=256)
"""Nodes, GPUs or cores, every one of which a plan lists."""
_PORT = partial(whole, high=65535)
_SEED = partial(whole, high=MAX_SEED)
_NUMBER = partial(whole, high=999_999_999)

_RECIPE = Argument("recipe", "a name from `rove recipes`, or FILE.py:NAME", {"metavar": "RECIPE"})

COMMANDS: dict[str, Command] = {
    "demo": Command(
        handlers.do_demo,
        "warm up, train and evaluate the demo recipe, then print the table; or, demo robot, run an arm",
        (
            Argument(
                "what",
                "robot: serve a tiny policy, run it on a simulated Franka, and let everything go wrong",
                {"nargs": "?", "choices": ("robot",), "metavar": "robot"},
            ),
        ),
        settings=True,
    ),
    "recipes": Command(handlers.do_recipes, "list the recipes"),
    "show": Command(handlers.do_show, "print and check a recipe's settings", (_RECIPE,), settings=True),
    "train": Command(
        handlers.do_train,
        "train a recipe, or go on with a run that was stopped",
        (
            replace(_RECIPE, options={"metavar": "RECIPE", "nargs": "?"}),
            Argument("--resume", "directory of the run to go on with", {"metavar": "RUN", "type": Path}),
            Argument(
                "--profile", "write trace.json, a timeline for ui.perfetto.dev", {"action": "store_true"}
            ),
            Argument("--ray-address", "use the Ray cluster at this address; auto: this machine's"),
        ),
        settings=True,
    ),
    "study": Command(
        handlers.do_study,
        "compare recipes over seeds, and write a page of what was found; without a name, list the studies",
        (
            Argument("name", "a study, or FILE.py:NAME", {"nargs": "?", "metavar": "NAME"}),
            Argument(
                "--run-dir", "folder of all studies (default: runs/studies)", {"type": Path, "metavar": "DIR"}
            ),
            Argument(
                "--jobs",
                "runs side by side, each on its share of the cores (default: 1)",
                {"type": _COUNT, "default": 1, "metavar": "N"},
            ),
        ),
    ),
    "sft": Command(handlers.do_sft, "only the supervised warm-up of a recipe", (_RECIPE,), settings=True),
    "collect": Command(
        handlers.do_collect,
        "only the expert demonstrations of a recipe, or of a suite such as libero:object",
        (_RECIPE, Argument("--out", "file to write (default: in the run's directory)", {"type": Path})),
        settings=True,
    ),
    "eval": Command(
        handlers.do_eval,
        "evaluate a checkpoint on held-out episodes",
        (
            Argument(
                "checkpoint",
                "a policy directory, e.g. runs/demo/sft; a served one, ws://HOST:PORT; or random",
                {"metavar": "CHECKPOINT"},
            ),
            Argument(
                "--suite",
                "environment suite, e.g. tabletop, libero:130 or maniskill:PickCube-v1",
                {"required": True},
            ),
            Argument("--tasks", "a named set of tasks, or task ids separated by commas"),
            Argument(
                "--variant", "a shifted variant; several separated by commas; or all", {"default": "none"}
            ),
            Argument("--episodes", "episodes for each variant", {"type": _COUNT, "metavar": "N"}),
            Argument("--decoding", "greedy or sample"),
            Argument("--num-envs", "episodes simulated at once", {"type": _COUNT, "metavar": "B"}),
            Argument("--seed", "of the sampling noise", {"type": _SEED, "default": 0, "metavar": "N"}),
            Argument(
                "--execute",
                "actions executed of a server's answer (default: Rove's all, another's 5) or a flow policy's",
                {"type": _COUNT, "metavar": "N"},
            ),
            Argument(
                "--import",
                "a file that registers the suite or the policy; may be given again",
                {"type": Path, "metavar": "FILE.py", "dest": "files", "action": "append", "default": []},
            ),
            Argument(
                "--out",
                "file for every episode's outcome, as JSON; a stopped evaluation goes on from its journal",
                {"type": Path},
            ),
        ),
        settings=True,
    ),
    "serve": Command(
        handlers.do_serve,
        "serve a checkpoint to robots and simulators, by openpi's websocket protocol",
        (
            Argument(
                "checkpoint",
                "a policy directory, e.g. runs/demo/best",
                {"type": Path, "metavar": "CHECKPOINT"},
            ),
            Argument(
                "--suite", "the suite in whose conventions it answers (default: its run's, else its own)"
            ),
            Argument("--host", "address to listen at; 0.0.0.0: other machines too (default: 127.0.0.1)"),
            Argument("--port", "port to listen at; 0: any (default: 8000)", {"type": _PORT, "metavar": "N"}),
            Argument("--keys", "whose entries clients send: libero, droid or aloha", {"default": "libero"}),
            Argument("--images", "or those of the pictures, KEY,KEY", {"type": names, "metavar": "KEYS"}),
            Argument("--state", "those of the robot's state, KEY,KEY", {"type": names, "metavar": "KEYS"}),
            Argument("--prompt", "that of the instruction", {"metavar": "KEY"}),
            Argument("--limit", "most observations in a forward pass", {"type": _COUNT, "metavar": "N"}),
            Argument(
                "--wait",
                "most milliseconds that one waits for others",
                {"type": milliseconds, "metavar": "MS"},
            ),
            Argument("--message-limit", "most bytes of a message", {"type": _COUNT, "metavar": "N"}),
            Argument(
                "--import",
                "a file that registers the suite or the policy; may be given again",
                {"type": Path, "metavar": "FILE.py", "dest": "files", "action": "append", "default": []},
            ),
        ),
        settings=True,
    ),
    "data": Command(
        handlers.do_data,
        "bring robot data in, take it out, and look at it: rove data import, export, show or recover",
        (
            Argument(
                "what",
                "import: make demonstrations of a data set; export: the other way; show: print what it is; "
                "recover: finish a recording that was cut off",
                {"choices": ("import", "export", "show", "recover"), "metavar": "WHAT"},
            ),
            Argument(
                "source",
                "a LeRobot folder, or LIBERO's .hdf5 files; of export, a file of demonstrations",
                {"type": Path, "metavar": "SOURCE"},
            ),
            Argument("--suite", "the suite that the demonstrations are for, e.g. libero:object"),
            Argument("--out", "file of demonstrations, folder, or picture to write", {"type": Path}),
            Argument("--images", "features that are the pictures", {"type": names, "metavar": "KEYS"}),
            Argument("--state", "those of the robot's state; none", {"type": names, "metavar": "KEYS"}),
            Argument("--action", "that of the actions", {"metavar": "KEY"}),
            Argument(
                "--actions", "the convention of the actions, as JSON", {"type": Path, "metavar": "FILE.json"}
            ),
            Argument("--image-size", "pixels (default: the suite's)", {"type": _COUNT, "metavar": "N"}),
            Argument("--every", "frames between two rows (default: 1)", {"type": _COUNT, "metavar": "N"}),
            Argument("--fps", "frames a second, where the suite has others", {"type": _COUNT}),
            Argument("--episodes", "only the first so many", {"type": _COUNT, "metavar": "N"}),
            Argument("--failures", "take episodes that failed, too", {"action": "store_true"}),
            Argument("--episode", "the episode to draw (default: 0)", {"type": whole, "metavar": "N"}),
        ),
    ),
    "robot": Command(
        handlers.do_robot,
        "run a served policy on an arm, within limits",
        (
            Argument("policy", "address of a served policy, ws://HOST:PORT", {"metavar": "POLICY"}),
            Argument(
                "--arm",
                "address of a simulated arm, http://HOST:PORT, or a TOML file that describes one",
                {"required": True},
            ),
            Argument("--instruction", "what is to be done (default: what a simulated arm says)"),
            Argument("--episodes", "how many", {"type": _COUNT, "default": 1, "metavar": "N"}),
            Argument("--first", "number of the first one", {"type": _NUMBER, "default": 0, "metavar": "N"}),
            Argument(
                "--rate",
                "periods a second, 5 to 50 (default: 20)",
                {"type": partial(number, low=5, high=50), "default": 20.0, "metavar": "HZ"},
            ),
            Argument(
                "--horizon",
                "actions after which an episode has failed (default: 240)",
                {"type": _COUNT, "default": 240, "metavar": "N"},
            ),
            Argument(
                "--ahead",
                "ask for the next chunk when N actions are left (default: as its answers need)",
                {"type": _NUMBER, "metavar": "N"},
            ),
            Argument(
                "--execute",
                "actions of an answer that are executed (default: Rove's all, another's 5)",
                {"type": _COUNT, "metavar": "N"},
            ),
            Argument("--record", "folder of a data set in LeRobot's layout", {"type": Path}),
            Argument("--log", "file for every event, a line of JSON each", {"type": Path}),
            Argument(
                "--stop-port",
                "port at which POST /stop stops the arm (default: any that is free)",
                {"type": _PORT, "default": 0, "metavar": "N"},
            ),
            Argument("--dry-run", "show what would be sent, and send nothing", {"action": "store_true"}),
        ),
    ),
    "simulate": Command(
        handlers.do_simulate,
        "simulate a Franka in a task of LIBERO, behind the HTTP server of SERL's set-ups",
        (
            Argument(
                "task",
                "e.g. object/pick_up_the_milk_and_place_it_in_the_basket",
                {"metavar": "TASK"},
            ),
            Argument("--host", "address to listen at (default: 127.0.0.1)", {"default": "127.0.0.1"}),
            Argument(
                "--port",
                "port to listen at; 0: any (default: 5000)",
                {"type": _PORT, "default": 5000, "metavar": "N"},
            ),
            Argument(
                "--image-size",
                "pixels of a picture's side (default: 128)",
                {"type": _COUNT, "default": 128, "metavar": "N"},
            ),
            Argument("--one-camera", "leave out the camera in the hand", {"action": "store_true"}),
            Argument(
                "--speed",
                "of its time: 0.5 where the machine cannot keep up, with half the --rate",
                {"type": partial(number, low=0.05, high=4), "default": 1.0, "metavar": "X"},
            ),
            Argument(
                "--split",
                "initial states that episodes begin in: held_out (default) or train",
                {"choices": ("held_out", "train"), "default": "held_out"},
            ),
        ),
    ),
    "assets": Command(
        handlers.do_assets,
        "download what a suite needs, check it, and say what is missing",
        (
            Argument("suite", "maniskill", {"metavar": "SUITE"}),
            Argument("--check", "say what is there, and download nothing", {"action": "store_true"}),
        ),
    ),
    "report": Command(
        handlers.do_report,
        "write a run's report.html",
        (Argument("run", "directory of the run", {"type": Path, "metavar": "RUN"}),),
    ),
    "bench": Command(
        handlers.do_bench,
        "run benchmarks, all of them unless named",
        (Argument("name", "a script in benchmarks/", {"nargs": "*", "metavar": "NAME"}),),
    ),
    "plan": Command(
        handlers.do_plan,
        "measure a recipe's parts, predict every placement's iteration time, and pick one",
        (
            _RECIPE,
            Argument("--save", "file for the measurements", {"type": Path, "metavar": "FILE"}),
            Argument("--profile", "measurements to use, for new ones", {"type": Path, "metavar": "FILE"}),
            Argument("--nodes", "plan for so many nodes", {"type": _MACHINES, "default": 1, "metavar": "N"}),
            Argument("--gpus", "with so many GPUs each", {"type": _MACHINES, "metavar": "N"}),
            Argument("--card", "of this kind, by its rates: none is needed", {"choices": ("h100",)}),
            Argument("--cores", "with so many cores each", {"type": _MACHINES, "metavar": "N"}),
            Argument("--check", "also run each one here, and show its time", {"action": "store_true"}),
        ),
        settings=True,
    ),
    "doctor": Command(
        handlers.do_doctor,
        "say what this machine has and lacks, or with --policy whether a checkpoint fits a suite",
        (
            Argument("--policy", "a checkpoint directory, or a name on the hub", {"metavar": "CHECKPOINT"}),
            Argument("--suite", "the suite that it is for, e.g. libero_spatial", {"metavar": "SUITE"}),
            Argument("--decoding", "how it decodes", {"choices": ("autoregressive", "parallel")}),
            Argument("--attention", "how it attends", {"choices": ("causal", "bidirectional")}),
            Argument("--unnorm_key", "data set whose statistics un-normalise", {"metavar": "KEY"}),
            Argument("--center_crop", "crop pictures", {"choices": ("true", "false")}),
            Argument("--dtype", "of its weights in memory", {"choices": ("float32", "bfloat16")}),
        ),
    ),
}
