"""signal and wait: where the queues of two devices meet (csrc/core/op_list.h).

`barrier.signal`, `barrier.wait`: one program each. What is waited for is a count that goes on, in
memory of the devices, so a graph that is launched again waits for what the other one signals again.

Order: what kernels before the signal stored, on any device, is seen after the wait. A kernel sees
what those before it on its queue wrote; the release at the scope of the system makes all of that
visible to whoever acquires the count. The largest count stays, so that the host can end every wait
for good by writing one that no signal exceeds (kBarrierOpen).

Peer atomics need NVLink (or another link with native ones), which the runtime checks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.spec import Launch, Spec


@triton.jit
def signal(
    counts,  # [2] i64, of this queue: signals, waits
    peer_arrived,  # i64, on the other device
):
    count = tl.load(counts) + 1
    tl.store(counts, count)
    tl.atomic_max(peer_arrived, count, sem="release", scope="sys")


@triton.jit
def wait(
    counts,  # [2] i64, of this queue: signals, waits
    arrived,  # i64: signals of the other queue
):
    expected = tl.load(counts + 1) + 1
    tl.store(counts + 1, expected)
    seen = tl.atomic_add(arrived, 0, sem="acquire", scope="sys")
    while seen < expected:
        seen = tl.atomic_add(arrived, 0, sem="acquire", scope="sys")


def _spec(name: str, function: object, flag: str) -> Spec:
    return Spec(
        name=f"barrier.{name}",
        function=function,
        parameters={"counts": "*i64:8", flag: "*i64:8"},
        constexprs={},
        launch={"default": Launch(num_warps=1)},
        grid=((1,), (1,), (1,)),
        reason="One thread, some 2 µs over NVLink. It polls memory of its own device, which costs "
        "the other kernels nothing.",
        ops=(name,),
        max_registers=32,
    )


SPECS = [_spec("signal", signal, "peer_arrived"), _spec("wait", wait, "arrived")]
