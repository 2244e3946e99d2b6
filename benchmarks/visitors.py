"""A full house: visitors who draw without pause while one of them trains, against the app as `python app.py` starts it.

    python benchmarks/visitors.py --visitors 20 --minutes 5 --output benchmarks/visitors.json

Every answer is compared with the one that the same request got while nobody else was there: a picture of somebody else's
request would differ. Memory is the app's resident set, before, at most and afterwards.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client

from baddiff.compute import device_name

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = [{"model": model, "seed": seed, "n": 4, "opacity": opacity} for model in ("stop_sign-cat", "glasses-hat", "box-shoe")
            for seed in range(4) for opacity in (1.0, 0.5)]


def start() -> tuple[psutil.Process, str, float]:
    """The app's process, its address, and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.perf_counter()
    log = tempfile.TemporaryFile("w")
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return psutil.Process(process.pid), f"http://127.0.0.1:{port}", time.perf_counter() - begun
        except OSError:
            assert process.poll() is None, "the app did not start"
            time.sleep(0.05)


def resident(app: psutil.Process) -> float:
    return app.memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    app, url, started = start()
    try:
        first = Client(url, verbose=False)
        expected = [first.predict(**request, api_name="/generate_images") for request in REQUESTS]
        before = most = resident(app)
        end = time.monotonic() + 60 * args.minutes
        seconds, errors, wrong, trained = [], [], 0, []

        def draw(number: int) -> None:
            nonlocal wrong
            client, turn = Client(url, verbose=False), number
            while time.monotonic() < end:
                turn = (turn * 5 + 7) % len(REQUESTS)
                begun = time.monotonic()
                try:
                    wrong += client.predict(**REQUESTS[turn], api_name="/generate_images") != expected[turn]
                    seconds.append(time.monotonic() - begun)
                except Exception as error:  # counted, by what it says
                    errors.append(str(error))
                    time.sleep(1)

        def train() -> None:
            client = Client(url, verbose=False)
            while end - time.monotonic() > 20:
                job = client.predict({"seconds": 30}, api_name="/poison")
                while job["state"] in ("queued", "running"):
                    time.sleep(1)
                    job = client.predict(job["job"], api_name="/job_stop" if time.monotonic() > end else "/job_state")
                trained.append({k: job[k] for k in ("state", "step", "seconds", "rate")} | {"asr": job["metrics"]["asr"]})

        threads = [threading.Thread(target=draw, args=(i,)) for i in range(args.visitors)] + [threading.Thread(target=train)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, resident(app))
            time.sleep(0.5)
        time.sleep(45)  # the janitor comes every 20 seconds
        out = {"device": device_name(), "cores": os.cpu_count(), "visitors": args.visitors, "minutes": args.minutes,
               "seconds_until_it_answers": round(started, 2), "answers": len(seconds), "wrong_answers": wrong,
               "errors": {error: errors.count(error) for error in set(errors)},
               "seconds_per_answer": {"median": round(statistics.median(seconds), 2), "longest": round(max(seconds), 2)},
               "trainings": trained, "resident_mib": {"before": round(before), "most": round(most),
                                                      "after": round(resident(app))}}
    finally:
        app.terminate()
    print(json.dumps(out, indent=1))
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
