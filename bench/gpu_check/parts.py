"""What is checked: a row a part, in the order in which they run, the most valuable first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    # of its module beside this one, whose `run` gets a `Check` and returns a line of text
    name: str
    about: str
    # seconds after which it is killed
    limit: float
    # in a dry walk: whether its kernels run in Triton's interpreter
    is_interpreted: bool = True
    # seconds without which it is not begun: then it has failed, or is skipped if it can wait
    least: float = 3.0
    can_wait: bool = False


PARTS = {
    part.name: part
    for part in (
        Part("environment", "device, versions, clocks, what a copy and a matmul reach", 40),
        Part("warm_up", "compiles for every D and dtype, in parallel", 90),
        Part("exactness", "`exact` beside float64 on 10⁸ rows of hard data", 150),
        Part("predictions", "predicted and measured time of the roofline's searches", 60),
        Part("sums", "sums per code beside others, and on uneven codes", 60),
        Part("repeats", "50 repeats bit by bit, beside other work", 45),
        Part("graphs", "CUDA graphs: replay and eager bit by bit", 45),
        Part("compiled", "torch.compile(fullgraph=True) beside eager", 60),
        Part("recompiles", "one program for 50 batch sizes", 45, is_interpreted=False),
        Part("large", "more than 2³¹ elements", 60),
        Part("peers", "time and memory beside peers", 90, is_interpreted=False),
        Part("suite", "the tests that run kernels", 170, is_interpreted=False),
        Part("sanitizer", "compute-sanitizer on small cases", 90),
        Part(
            "tuning",
            "the fastest tiles for the shapes of real models: tables/",
            400,
            least=60.0,
            can_wait=True,
        ),
    )
}
