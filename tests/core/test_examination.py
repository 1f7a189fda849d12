"""Models are examined one at a time, and nobody waits for those that nobody asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.node import Node
from seallmd.core.settings import NodeSettings, ReplacementSettings, ServiceSettings
from tests.core.helpers import shape


@dataclass
class Bench:
    """A node, and what its host process was told. No answer comes but those of the test."""

    names: str
    told: list[msg.ToHost] = field(default_factory=list)

    def __post_init__(self) -> None:
        services = tuple(ServiceSettings(name=name, model=name) for name in self.names)
        settings = NodeSettings(services=services, devices=1, block_bytes=256, host_bytes=1 << 30)
        self.node = Node(settings)

    def happen(self, event: ev.Event) -> list[ev.Action]:
        actions = self.node.handle(event, self.node.state.now + 0.01)
        self.told += [action.message for action in actions if isinstance(action, ev.ToHostProcess)]
        self.node.check()
        return actions

    def say(self, message: msg.Probed | msg.ProbeFailed | msg.JobProgress) -> None:
        self.happen(ev.FromHostProcess(message))

    @property
    def probed(self) -> str:
        return "".join(message.service for message in self.told if isinstance(message, msg.Probe))


def test_those_who_are_asked_for_go_first() -> None:
    """With many models, a request that comes at the start waits for the model at hand and for its own."""
    bench = Bench("abcdef")
    bench.happen(ev.HostUp())
    assert bench.probed == "a"
    bench.happen(ev.ExaminationWanted("e"))
    bench.happen(ev.ExaminationWanted("nobody"))
    bench.happen(ev.LoadWanted(1, "c"))
    assert bench.probed == "a", "one at a time"
    bench.say(msg.Probed("a", "/a", shape()))
    bench.say(msg.ProbeFailed("c", "it is broken"))
    assert bench.probed == "ace"
    bench.say(msg.Probed("e", "/e", shape()))
    bench.say(msg.Probed("b", "/b", shape()))
    bench.say(msg.Probed("d", "/d", shape()))
    bench.say(msg.Probed("f", "/f", shape()))
    assert bench.probed == "acebdf"


def test_weights_are_read_before_the_next_model_is_examined() -> None:
    """The host process does one job after the other: the first model serves while others are examined."""
    bench = Bench("abc")
    bench.happen(ev.HostUp())
    bench.happen(ev.WorkerUp(0, "cpu", 1 << 20))
    bench.happen(ev.LoadWanted(1, "a"))
    bench.say(msg.Probed("a", "/a", shape()))
    jobs = [type(message) for message in bench.told]
    assert jobs == [msg.Probe, msg.BuildImage, msg.Probe]


def test_files_are_fetched_beside_it() -> None:
    """A model that is downloaded for minutes keeps no other waiting; who kills the loader is known."""
    bench = Bench("abc")
    bench.happen(ev.HostUp())
    bench.say(msg.JobProgress("a", "queue", 0, 0))
    assert bench.probed == "ab"
    bench.say(msg.JobProgress("b", "queue", 0, 0))
    bench.say(msg.JobProgress("a", "download", 1, 2))
    assert bench.probed == "abc"
    bench.say(msg.JobProgress("a", "fetched", 0, 0))
    assert bench.probed == "abc", "in its turn, or one of both would be examined twice"
    bench.say(msg.Probed("c", "/c", shape()))
    assert bench.probed == "abca"
    bench.happen(ev.HostLost("killed"))
    crashes = {name: service.crashes for name, service in bench.node.state.services.items()}
    assert crashes == {"a": 1, "b": 0, "c": 0}
    bench.happen(ev.HostUp())
    assert bench.probed == "abcab"


def test_what_leaves_before_its_turn_is_gone_at_once() -> None:
    """A service that is taken out of the configuration is not examined, unless it is at that moment."""
    bench = Bench("abc")
    bench.happen(ev.HostUp())
    settings = bench.node.state.settings
    kept = tuple(service for service in settings.services if service.name == "c")
    bench.happen(ev.Reconfigured(kept, (), settings.policy, ReplacementSettings()))
    assert set(bench.node.state.services) == {"a", "c"}
    bench.say(msg.Probed("a", "/a", shape()))
    assert set(bench.node.state.services) == {"c"}
    assert bench.probed == "ac"
