"""The load benchmark on a real suite."""

from __future__ import annotations

from patience import HANG_S

from services.tools.bench.load.campaign import GIVEN, Campaign, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.workload import workload_of
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack


async def test_a_running_suite_is_measured(stack: Stack) -> None:
    workload = workload_of(
        "[[output_tokens]]\ndistribution = 'constant'\nvalue = 8\n"
        "[[prompt_tokens]]\ndistribution = 'constant'\nvalue = 30\n"
        "[[classes]]\nname = 'patient'\nttft_ms = 60000\ntpot_ms = 60000\n"
    )
    # Without warm-up, the first request of each session counts, however slow the machine is.
    window = Window(warm_up_s=0, measure_s=8, drain_s=HANG_S)
    campaign = Campaign(LoadPlan([], [2], None, 1, window, workload, workload), Progress())
    await campaign.run_server(stack.url, pools=False)
    [point] = campaign.results.points
    found = point.measures
    assert (point.arm, point.sessions) == (GIVEN, 2)
    assert found.attained == found.complete == found.requests > 0, found.reasons
    assert found.goodput == found.throughput > 0
    assert found.classes["patient"].requests == found.requests
    assert found.drafting is not None
    counted = [record for *_, record in campaign.records if window.counts(record.start_s)]
    assert found.drafting.verified == sum(record.summary["verified"] for record in counted)
    assert all(record.summary["tokens"] == record.tokens for record in counted)
    assert all(sum(count for _, count in record.arrivals) == record.tokens for record in counted)
    assert all(campaign.asked[record.session, record.number].device == record.device for record in counted)
