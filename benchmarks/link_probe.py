"""What a link gives a plain socket: bytes per second one way, and the time of a round trip. Standard library only.

    python benchmarks/link_probe.py 0 HOST      on HOST: answers
    python benchmarks/link_probe.py 1 HOST      on another: asks, and prints one line of JSON

Both use TCP without Nagle's delay. The round trip is the median of one-byte questions and answers; the rate is what has arrived
in the time after the first ``SETTLE_S`` seconds, in which buffers, and a token bucket, fill or empty.
"""

import json
import socket
import statistics
import sys
import time

PORT = 29401
PATIENCE_S = 20.0
TURNS, TURNS_S = 200, 1.0
SETTLE_S, FLOW_S = 0.3, 0.7
CHUNK = 1 << 18


def answer() -> None:
    """Sends back every byte of the first part; of the second, tells how many came in how many seconds."""
    with socket.create_server(("", PORT)) as listener:
        listener.settimeout(PATIENCE_S)
        line, _ = listener.accept()
    with line:
        line.settimeout(PATIENCE_S)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (byte := line.recv(1)) == b"?":
            line.sendall(byte)
        began, came, since, buffer = time.perf_counter(), 0, 0.0, bytearray(CHUNK)
        last = began
        while got := line.recv_into(buffer):
            last = time.perf_counter()
            if since:
                came += got
            elif last - began > SETTLE_S:
                since = last  # what has come so far is not counted
        line.sendall(json.dumps({"bytes": came, "seconds": last - since if since else 0.0}).encode())


def ask(host: str) -> None:
    """Prints round_trip_seconds and bytes_per_second."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            line = socket.create_connection((host, PORT), PATIENCE_S)
            break
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    with line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        turns: list[float] = []
        while len(turns) < TURNS and sum(turns) < TURNS_S:
            asked = time.perf_counter()
            line.sendall(b"?")
            line.recv(1)
            turns.append(time.perf_counter() - asked)
        line.sendall(b"!")
        chunk, until = bytes(CHUNK), time.perf_counter() + SETTLE_S + FLOW_S
        while time.perf_counter() < until:
            line.sendall(chunk)
        line.shutdown(socket.SHUT_WR)
        told = json.loads(line.makefile().read())
    if not told["seconds"]:
        sys.exit("too little came to tell the link's rate")
    print(json.dumps({"round_trip_seconds": statistics.median(turns), "bytes_per_second": told["bytes"] / told["seconds"]}))


if __name__ == "__main__":
    if sys.argv[1] == "0":
        answer()
    else:
        ask(sys.argv[2])
