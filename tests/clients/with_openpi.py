"""Runs in the environment of openpi's own client: python with_openpi.py PORT STATE OUT.npz"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

sys.path.insert(0, str(Path(__file__).parent))

from observations import CLIENTS, TURNS, observation


def main(port: int, state: int, out: str) -> None:
    """Ask from all clients at once, and write down every answer; then ask something that is refused."""
    together = threading.Barrier(CLIENTS)

    def converse(client: int) -> np.ndarray:
        policy = WebsocketClientPolicy("127.0.0.1", port)
        together.wait()
        return np.stack([policy.infer(observation(client, turn, state))["actions"] for turn in range(TURNS)])

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = np.stack(list(pool.map(converse, range(CLIENTS))))
    policy = WebsocketClientPolicy("127.0.0.1", port)
    try:
        policy.infer({"prompt": "put the red cube on the blue plate"})
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    after = policy.infer(observation(0, 0, state))["actions"]
    chunk = policy.get_server_metadata()["rove"]["chunk"]
    np.savez(out, answers=answers, refused=refused, after=after, chunk=chunk, numpy=np.__version__)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
