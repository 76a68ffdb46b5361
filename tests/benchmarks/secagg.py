"""What does secure aggregation cost in time, on the wire and in memory?

    python tests/benchmarks/secagg.py [--repeats N] [--flower-python PATH] [--quick]

All in one run, on one thread, interleaved, medians of pairwise ratios; the last line is one JSON object:

    speedup_vs_flower      time of Flower's SecAgg+ over ours, to encode 10 M float32 and add nine masks: one's own,
                           and those with eight neighbours
    upload_over_serialise  time that is added at upload if the masks were summed before, over the time in which NVFlare
                           serialises the 10 M float32: ``Encoding.encode`` onto the masks over ``fobs.dumps``
    bytes_per_param        of a masked vector, serialised by ``fobs.dumps``
    he_bytes_per_param     of a vector under TenSEAL's CKKS, with the parameters of NVFlare's ``HEBuilder``
    seconds_64_clients     a session of 64 sites and 1 M parameters in one process, from the first advert to the mean

A figure whose other party is not to be had here is null. Printed beside them: the upload in a process whose glibc
returns freed memory, and over other ways to serialise; bytes and time of Flower and of CKKS; all other messages of a
session of 64; time and peak memory in which the server unmasks when one of 64 is gone; sessions of fewer sites.

Flower has an environment of its own, made in the user's cache folder unless ``--flower-python`` names one. What is
timed there is what its client does for one upload (``secaggplus_mod._collect_masked_vectors``) from the update to the
masked integers, with its default ranges. Keys are agreed on and vectors serialised outside both times.

The upload is measured as at a site, where glibc keeps freed memory: that makes serialising faster, and the figure
worse. No value is beyond the bound, as in training; what clipping adds is printed.

Peak memory is that of a fresh process with 10 M parameters, less that of one with a single parameter. The server's sum
and one received vector are in it. Sites that take part in the server's measurements send zeros: their own masks take
no part in its time. In the sessions of the last figure they mask, and the mean is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.app_common.np.np_downloader import ArrayDownloadable
from nvflare.fuel.utils import fobs

from custom.device import keep_freed_memory
from privacy.secagg.client import Client
from privacy.secagg.encoding import Block, Encoding, Vector
from privacy.secagg.identity import Identity
from privacy.secagg.masking import Mask, add_masks
from privacy.secagg.messages import Session
from privacy.secagg.rules import Floor, Rules
from privacy.secagg.server import Server

MILLION = 1_000_000
NEIGHBOURS = 8
SITES = 64
BOUND = 1.0  # of the experiment's block ``secure_aggregation``
CLIPPING_BOUND = 0.02  # two standard deviations of the values: every block of the encoder clips
MB_A_SITE = 1.0  # all messages of a session but the vector

FLOWER_VERSION = "1.42.0"
FLOWER = """
import sys, time
from importlib.metadata import version
import numpy as np
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine, parameters_addition, parameters_mod, parameters_multiply, parameters_subtraction)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

size, neighbours, clipping_range = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
target_range, mod_range = 2**22, 2**32
vector = np.random.default_rng(0).normal(0, 0.01, size).astype(np.float32)
seeds = [bytes([number]) * 32 for number in range(neighbours + 1)]

def upload():
    parameters = parameters_multiply([vector], 1.0)
    parameters = factor_combine(target_range, quantize(parameters, clipping_range, target_range))
    shapes = [array.shape for array in parameters]
    parameters = parameters_addition(parameters, pseudo_rand_gen(seeds[0], mod_range, shapes))
    for number, seed in enumerate(seeds[1:]):
        mask = pseudo_rand_gen(seed, mod_range, shapes)
        change = parameters_addition if number % 2 else parameters_subtraction
        parameters = change(parameters, mask)
    return parameters_mod(parameters, mod_range)

for _ in sys.stdin:
    start = time.perf_counter()
    masked = upload()
    seconds = time.perf_counter() - start
    print(seconds, sum(len(ndarray_to_bytes(array)) for array in masked), version("flwr"), flush=True)
"""

Timer = Callable[[], float]  # does something, and returns the seconds that it took


def update(size: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.01, size).astype(np.float32)


def encoding_of(size: int, parties: int, bound: float = BOUND) -> Encoding:
    return Encoding(blocks=(Block(name="update", shape=(size,), bound=bound),), parties=parties)


def nine_masks() -> list[Mask]:
    return [(bytes([number]) * 32, "aes", -1 if number % 2 else 1) for number in range(NEIGHBOURS + 1)]


def timed(action: Callable[[], object]) -> Timer:
    def seconds() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return seconds


def measured(candidates: Mapping[str, Timer], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, ``repeats`` times."""
    for timer in candidates.values():  # warm-up
        timer()
    result: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name in candidates if repeat % 2 == 0 else reversed(candidates):
            result[name].append(candidates[name]())
    for name, values in result.items():
        print(f"  {name:44} {1000 * statistics.median(values):9.1f} ms", flush=True)
    return result


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """The function's result in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# Flower


def flower_python(given: str | None) -> str | None:
    """An interpreter that has Flower, or None."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "fedct" / f"flower-{FLOWER_VERSION}"
    python = given or str(folder / "bin" / "python")
    try:
        if given is None and subprocess.run([python, "-c", "import flwr"], capture_output=True).returncode:
            raise FileNotFoundError(python)
    except OSError:
        print(f"Installing Flower {FLOWER_VERSION} in {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", f"flwr=={FLOWER_VERSION}"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"  it cannot be installed here ({error})")
            return None
    return python


@contextlib.contextmanager
def flower(python: str, size: int) -> Iterator[tuple[Timer, dict[str, Any]]]:
    """A process of its own that makes one upload when it is asked to; and what it says of the last one."""
    command = [python, "-c", FLOWER, str(size), str(NEIGHBOURS), str(BOUND)]
    last: dict[str, Any] = {}
    quiet = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def seconds() -> float:
            print(file=process.stdin, flush=True)
            took, length, last["version"] = process.stdout.readline().split()
            last["bytes"] = int(length)
            return float(took)

        yield seconds, last
        process.stdin.close()


def compare_flower(python: str | None, size: int, repeats: int) -> float | None:
    print(f"Encode {size / MILLION:g} M parameters and add {NEIGHBOURS + 1} masks", flush=True)
    values, encoding = {"update": update(size)}, encoding_of(size, NEIGHBOURS + 1)

    def ours() -> None:
        add_masks(encoding.encode(values, weight=1.0), nine_masks())

    if python is None:
        measured({"ours": timed(ours)}, repeats)
        return None
    with flower(python, size) as (seconds, last):
        times = measured({"ours": timed(ours), "Flower's SecAgg+": seconds}, repeats)
    result = ratio(times, "Flower's SecAgg+", "ours")
    bytes_per_param = last["bytes"] / size
    print(f"  {result:.1f} x; Flower {last['version']} uploads {bytes_per_param:.2f} bytes per parameter", flush=True)
    return result


# Upload


def upload(size: int, repeats: int, kept: bool) -> float:
    """Encode onto the masks over fobs; in a fresh process, because what glibc is told cannot be taken back."""
    if kept:
        keep_freed_memory()
    numpy_decomposers.register()
    print(f"Upload of {size / MILLION:g} M parameters, masks summed before; ", end="")
    print("freed memory kept, as at a site" if kept else "glibc as it is", flush=True)
    vector = update(size)
    values, message = {"update": vector}, {"update": vector}
    encoding, clipping = encoding_of(size, NEIGHBOURS + 1), encoding_of(size, NEIGHBOURS + 1, CLIPPING_BOUND)
    masks = np.zeros(encoding.size, encoding.dtype)
    add_masks(masks, nine_masks())
    onto, after = "encode onto the masks", "encode, then add the masks"
    dumps, cell, copy = "fobs.dumps", "as a cell sends it: savez", "ndarray.tobytes"
    times = measured(
        {
            onto: timed(lambda: encoding.encode(values, weight=1.0, onto=masks)),
            f"{onto}, all clipping": timed(lambda: clipping.encode(values, weight=1.0, onto=masks)),
            after: timed(lambda: np.add(encoding.encode(values, weight=1.0), masks, out=masks)),
            "nothing but an addition of two vectors": timed(
                lambda: np.add(vector.view(np.uint32), masks[1:], out=masks[1:])
            ),
            dumps: timed(lambda: fobs.dumps(message, buffer_list=True)),
            cell: timed(lambda: ArrayDownloadable(message, 1 << 21).produce_item(0)),
            copy: timed(vector.tobytes),
        },
        repeats,
    )
    for name in (dumps, cell, copy):
        one, two = ratio(times, onto, name), ratio(times, after, name)
        print(f"  over {name}: {one:.3f} onto the masks, {two:.3f} in two steps", flush=True)
    return ratio(times, onto, dumps)


# Wire


def wire(message: object) -> int:
    return len(fobs.dumps(message))


def compare_he(size: int, repeats: int) -> tuple[float, float | None]:
    """Bytes per parameter, ours and CKKS'."""
    print(f"Encode, mask or encrypt, and serialise {size / MILLION:g} M parameters", flush=True)
    numpy_decomposers.register()
    vector, encoding = update(size), encoding_of(size, NEIGHBOURS + 1)

    def masked() -> bytes:
        result = encoding.encode({"update": vector}, weight=1.0)
        add_masks(result, nine_masks())
        content: bytes = fobs.dumps({"update": result})
        return content

    ours, candidates = len(masked()) / size, {"ours": timed(masked)}
    if importlib.util.find_spec("tenseal") is None:
        print("  TenSEAL is not installed")
        measured(candidates, repeats)
        return ours, None
    import tenseal
    from nvflare.app_opt.he import decomposers

    decomposers.register()
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    context.generate_relin_keys()
    context.global_scale = 2**40

    def encrypted() -> bytes:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
            content: bytes = fobs.dumps({"update": tenseal.ckks_vector(context, vector)})
        return content

    theirs = len(encrypted()) / size
    times = measured({**candidates, "CKKS": timed(encrypted)}, repeats)
    print(f"  bytes per parameter: ours {ours:.3f}, CKKS {theirs:.2f}: {theirs / ours:.1f} x")
    print(f"  CKKS takes {ratio(times, 'CKKS', 'ours'):.1f} x our time", flush=True)
    return ours, theirs


# Sessions


def kits(count: int) -> tuple[Identity, ...]:
    """Of sites that NVFlare's code provisioned."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "privacy" / "secagg"))
    from federation import Authority, names

    authority = Authority()
    return tuple(authority.identity(name) for name in names(count))


def unmasking(
    sites: Sequence[Identity],
    *,
    size: int,
    masked: Callable[[Client], Vector],
    gone: int = 0,
    sizes: dict[str, int] | None = None,
) -> Server:
    """A server that has all it needs to unmask.

    Args:
        sites: their kits.
        size: of the vector.
        masked: a client's vector under its masks.
        gone: how many sites share and then send no vector.
        sizes: filled with the bytes of what one site sends (``up``) and receives (``down``) beside the vector.
    """
    sizes = {} if sizes is None else sizes
    names = tuple(site.party for site in sites)
    session = Session(job="a" * 64, run="run-1", task="train", round_number=0, nonce="first")
    rules = Rules(min_survivors=2)
    server = Server(session=session, rules=rules, root=sites[0].root)
    floor = Floor(peers=names, min_survivors=2)
    clients = {site.party: Client(identity=site, session=session, rules=rules, floor=floor) for site in sites}
    for name, client in clients.items():
        server.add_advert(name, client.advert)
        sizes["up: advert"] = wire(asdict(client.advert))
    roster = server.roster(size=size)
    sizes["down: roster"] = wire(asdict(roster))
    for name, client in clients.items():
        boxes = client.share(roster, size=size)
        server.add_boxes(name, boxes)
    sizes["up: boxes"] = wire([asdict(box) for box in boxes])
    boxes = server.boxes()
    sizes["down: boxes"] = wire([asdict(box) for box in boxes])
    for name, client in clients.items():
        client.receive([box for box in boxes if box.recipient == name])
        if name in names[gone:]:
            server.add_masked(name, masked(client))
    survivors = server.close()
    sizes["down: survivors"] = wire(asdict(survivors))
    for name in survivors.survived:
        signed = clients[name].confirm(survivors)
        server.add_signature(name, signed)
    sizes["up: signature"] = wire(asdict(signed))
    signatures = server.signatures()
    sizes["down: signatures"] = wire([asdict(signature) for signature in signatures])
    for name in survivors.survived:
        revealed = clients[name].reveal(signatures)
        server.add_revealed(name, revealed)
    sizes["up: shares"] = wire([asdict(share) for share in revealed])
    return server


def of_zeros(sites: Sequence[Identity], size: int, gone: int, sizes: dict[str, int] | None = None) -> Server:
    """As :func:`unmasking`, of sites that add no masks."""
    return unmasking(
        sites,
        size=size,
        masked=lambda client: client.mask(np.zeros(size, np.uint32), lambda masks: masks),
        gone=gone,
        sizes=sizes,
    )


def messages(sites: Sequence[Identity]) -> None:
    """Print what one site sends and receives beside its vector."""
    sizes: dict[str, int] = {}
    of_zeros(sites, 1, 0, sizes)
    print(f"Messages of a site in a session of {len(sites)}, beside the vector")
    for name, size in sizes.items():
        print(f"  {name:44} {size / 1000:9.1f} kB")
    total = sum(sizes.values()) / 1e6
    print(f"  {'together':44} {1000 * total:9.1f} kB: {'below' if total < MB_A_SITE else 'ABOVE'} {MB_A_SITE:g} MB")
    sys.stdout.flush()


def peak(sites: Sequence[Identity], size: int) -> int:
    """Bytes of this process at its largest, after it has unmasked without one site."""
    of_zeros(sites, size, gone=1).unmask()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def unmask_memory(sites: Sequence[Identity], size: int) -> None:
    """To be called while this process is small: a child's peak starts at its parent's size."""
    above = (apart(peak, sites, size) - apart(peak, sites, 1)) / (4 * size)
    print(f"Server at its largest, {size / MILLION:g} M parameters, one of {len(sites)} gone: {above:.2f} vectors")
    sys.stdout.flush()


def unmask_times(sites: Sequence[Identity], sizes: Sequence[int], repeats: int) -> None:
    """Print the time by size, and per parameter; the rest is that of recovering the secrets."""
    print(f"Server unmasks, one of {len(sites)} gone", flush=True)
    servers = {f"{size / MILLION:g} M parameters": of_zeros(sites, size, gone=1) for size in sizes}
    # Each further time takes the masks off once more: the same work.
    times = measured({name: timed(server.unmask) for name, server in servers.items()}, repeats)
    medians = [statistics.median(values) for values in times.values()]
    steps = [
        1e9 * (b - a) / (m - n) for a, b, n, m in zip(medians[:-1], medians[1:], sizes[:-1], sizes[1:], strict=True)
    ]
    print(f"  ns for each further parameter: {', '.join(f'{step:.1f}' for step in steps)}")
    rest = medians[-1] - sizes[-1] * (medians[-1] - medians[0]) / (sizes[-1] - sizes[0])
    print(f"  {1000 * rest:.0f} ms for the secrets of {len(sites)}, at any size", flush=True)


def session_seconds(sites: Sequence[Identity], vector: NDArray[np.float32]) -> float:
    """All stages of all sites and of the server, one after another."""
    encoding = encoding_of(len(vector), len(sites))
    values = {"update": vector}
    start = time.perf_counter()
    server = unmasking(
        sites,
        size=encoding.size,
        masked=lambda client: client.mask(
            client.masks(), lambda masks: encoding.encode(values, weight=1.0, onto=masks)
        ),
    )
    means, weight = encoding.decode(server.unmask())
    seconds = time.perf_counter() - start
    off = float(np.abs(means["update"] - vector).max())
    assert off <= encoding.error_bound(BOUND, total_weight=len(sites), parties=len(sites)), "not the mean"
    assert math.isclose(weight, len(sites), rel_tol=1e-6), "not the weight"
    return seconds


def sessions(sites: Sequence[Identity], size: int, repeats: int) -> float:
    """Print the curve; return the seconds of all sites."""
    print(f"Sessions of {size / MILLION:g} M parameters, one after another in one process", flush=True)
    vector, seconds = update(size), math.nan
    for count in (3, 8, 16, 32, len(sites)):
        seconds = statistics.median(session_seconds(sites[:count], vector) for _ in range(repeats))
        print(f"  {count:2} sites: {seconds:6.2f} s, {1000 * seconds / count:5.0f} ms a site", flush=True)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--flower-python", help="an interpreter that has Flower; without it, one is set up")
    help_quick = "a tenth of the parameters and two repeats: that it runs, not what it costs"
    parser.add_argument("--quick", action="store_true", help=help_quick)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # of the processes that this one starts; here, nothing takes more
    scale, repeats = (10, 2) if options.quick else (1, options.repeats)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}", flush=True)
    sites = kits(SITES)
    unmask_memory(sites, 10 * MILLION)
    figures: dict[str, float | None] = {}
    python = flower_python(options.flower_python)
    figures["speedup_vs_flower"] = compare_flower(python, 10 * MILLION // scale, repeats)
    apart(upload, 10 * MILLION // scale, 2 * repeats + 1, False)
    figures["upload_over_serialise"] = apart(upload, 10 * MILLION // scale, 2 * repeats + 1, True)
    figures["bytes_per_param"], figures["he_bytes_per_param"] = compare_he(MILLION // scale, repeats)
    messages(sites)
    unmask_times(sites, [MILLION * quarters // 4 // scale for quarters in (1, 2, 4, 8)], repeats)
    figures["seconds_64_clients"] = sessions(sites, MILLION // scale, min(repeats, 3))
    print(f"load {os.getloadavg()[0]:.2f} at the end")
    print(json.dumps({name: None if value is None else round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
