"""All checks, in the order of the report."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_policysplit.config import Config
from megatron_policysplit.doctor import gpus, machine, network, nodes, run_directory, variables
from megatron_policysplit.doctor.asking import ProbeFailed, guarded
from megatron_policysplit.doctor.needs import Needs, needs_of
from megatron_policysplit.doctor.record import Record, fail, ok, warn
from megatron_policysplit.doctor.server_versions import check_server
from megatron_policysplit.doctor.versions import Interpreter, check_versions, look_at
from megatron_policysplit.errors import UserError
from megatron_policysplit.serving.processes import inherited_environment


@dataclass(frozen=True)
class Question:
    """What the command was asked.

    arguments: CONFIG and its overrides as they were given, for other nodes; [] without CONFIG.
    config: the configuration; None without one.
    hosts: other nodes by name; [] for this machine alone, or those of the allocation.
    by_srun: whether the nodes are those of the Slurm allocation, which srun asks.
    """

    arguments: Sequence[str] = ()
    config: Config | None = None
    hosts: Sequence[str] = ()
    by_srun: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def examine(question: Question) -> Iterator[Record]:
    """Make all checks; records come as they are found. A check that fails itself is a WARN."""
    environ, config = question.environ, question.config
    count = len(question.hosts) or _allocated(environ)
    needs: Needs | None = None
    if config is not None:
        needs = needs_of(config, count)
        yield _described(config, needs)
    driver, trainer, records = _look_at_trainer(environ)
    yield from records
    yield from guarded("versions", lambda: check_versions(trainer, driver.device_file, needs))
    if needs is not None and needs.own_servers:
        yield from guarded("SGLang", lambda: _check_server(trainer, needs, environ))
    yield from guarded("GPU", lambda: gpus.check_gpus(driver, trainer, needs))
    yield from _check_machine(len(trainer.gpus), driver.device_file, needs)
    yield from _check_network(environ, needs, count)
    if needs is not None:
        yield from guarded("run.dir", lambda: _check_directory(needs))
        yield from guarded("allocator", lambda: variables.check_allocators(config, environ))
    yield from guarded(
        "environment",
        lambda: variables.check_variables(
            environ,
            needs,
            capability=trainer.gpus[0].capability if trainer.gpus else None,
            cuda=trainer.cuda,
            cores=machine.cores(),
            libraries=variables.cuda_libraries,
        ),
    )
    if question.hosts:
        yield from _check_nodes(question)


def _allocated(environ: Mapping[str, str]) -> int:
    """The nodes of the Slurm allocation, or 1."""
    text = environ.get("SLURM_JOB_NUM_NODES", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def _described(config: Config, needs: Needs) -> Record:
    """The line about the configuration: for how much of this machine it asks."""
    value = f"{needs.ranks} rank{'s' * (needs.ranks > 1)}"
    if needs.nodes > 1:
        value += f" over {needs.nodes} nodes"
    if needs.own_servers:
        place = "on the actor's GPUs" if needs.colocated else "beside them"
        value += f", {needs.own_servers} SGLang server{'s' * (needs.own_servers > 1)} {place}"
    if needs.parameters is None:
        return warn(
            "configuration",
            f"{value}; the weights in model.path={config.model.path} cannot be read, so sizes are "
            "not compared",
            "`policysplit config` says what is wrong with them",
        )
    return ok("configuration", f"{value}, {needs.parameters / 1e6:,.1f} M parameters")


def _look_at_trainer(
    environ: Mapping[str, str],
) -> tuple[gpus.DriverFacts, Interpreter, list[Record]]:
    """The driver and this interpreter, and a record about what could not be asked."""
    driver = gpus.look_at_driver()
    if variables.hides_gpus(environ):  # which somebody meant to do
        driver = replace(driver, device_file=False)
    try:
        trainer = look_at(sys.executable, environ, imports_engine=driver.device_file)
    except ProbeFailed as error:
        unknown = Interpreter(".".join(map(str, sys.version_info[:3])), no_gpu="torch hangs")
        return (
            driver,
            unknown,
            [
                fail(
                    "interpreter",
                    f"its packages could not be asked: {error}",
                    "run `python -c 'import torch; torch.cuda.init()'`; a driver that hangs "
                    "needs a restart",
                )
            ],
        )
    return driver, trainer, []


def _check_server(trainer: Interpreter, needs: Needs, environ: Mapping[str, str]) -> list[Record]:
    """SGLang's interpreter; the trainer's own is not asked again."""
    server = trainer
    if needs.has_other_python:
        inherited = inherited_environment(environ, needs.server_python)
        if (path := needs.server_environment.get("PYTHONPATH")) is not None:
            inherited["PYTHONPATH"] = str(path)
        try:
            server = look_at(needs.server_python, inherited)
        except ProbeFailed as error:
            return [
                fail(
                    "SGLang",
                    f"rollout.server.python={needs.server_python}: {error}",
                    "give the interpreter of an environment that has SGLang",
                )
            ]
    return check_server(trainer, server, needs)


def _check_machine(gpu_count: int, has_gpu: bool, needs: Needs | None) -> Iterator[Record]:
    def shared_memory() -> list[Record]:
        space = machine.look_at_space("/dev/shm")
        return [machine.check_shared_memory(space, gpu_count, needs)]

    def temporary() -> list[Record]:
        return [machine.check_temporary(machine.look_at_space(tempfile.gettempdir()))]

    yield from guarded("shared memory", shared_memory)
    yield from guarded("temporary files", temporary)
    yield from guarded(
        "host memory", lambda: [machine.check_memory(machine.look_at_memory(), gpu_count, needs)]
    )
    yield from guarded(
        "limits", lambda: machine.check_limits(machine.look_at_limits(), machine.cores(), needs)
    )
    yield from guarded(
        "C compiler", lambda: [machine.check_compiler(machine.look_at_compiler(), has_gpu)]
    )


def _check_network(environ: Mapping[str, str], needs: Needs | None, count: int) -> Iterator[Record]:
    def names() -> list[Record]:
        master = environ.get("MASTER_ADDR")
        return [
            network.check_host_name(network.own_name(), environ, count),
            *network.check_interfaces(environ, network.interfaces()),
            *network.check_master(network.resolve(master) if master else None),
        ]

    def ports() -> list[Record]:
        facts = network.look_at_ports(environ, needs)
        return network.check_ports(facts, network.ephemeral_ports(), needs)

    yield from guarded("host name", names)
    yield from guarded("ports", ports)
    yield from guarded("servers", lambda: map(network.check_peer, network.look_at_peers(needs)))


def _check_directory(needs: Needs) -> list[Record]:
    directory = run_directory.look_at_directory(needs.run_dir)
    return run_directory.check_directory(directory, needs)


def _check_nodes(question: Question) -> Iterator[Record]:
    hosts, environ = question.hosts, question.environ
    port = environ.get("MASTER_PORT", "")
    number = int(port) if port.isdecimal() and 0 < int(port) < 65536 else nodes.PORT
    yield from guarded("nodes", lambda: nodes.check_hosts(nodes.look_at_hosts(hosts, number)))
    if question.by_srun:
        yield from guarded("clocks", lambda: nodes.check_clocks(nodes.ask_clocks(hosts, environ)))
        yield from guarded(
            "versions on nodes",
            lambda: nodes.check_alike(
                nodes.ask_nodes(hosts, question.arguments, environ), len(hosts)
            ),
        )


def question_of(
    arguments: Sequence[str], hosts: Sequence[str], asks_nodes: bool, environ: Mapping[str, str]
) -> tuple[Question, list[Record]]:
    """What the command line asks, and a FAIL for each part of it that cannot be taken up.

    arguments: CONFIG and overrides, or none. hosts: of --hosts. asks_nodes: --nodes.
    """
    from megatron_policysplit.config.checks import check_config
    from megatron_policysplit.config.load import load_config

    records, config = [], None
    if arguments:
        try:
            config = load_config(arguments[0], list(arguments[1:]))
            check_config(config)
        except UserError as error:
            config = None
            records.append(fail("configuration", str(error), "`policysplit config` checks it"))
    by_srun = False
    if asks_nodes and not hosts:
        try:
            hosts, by_srun = nodes.allocated_hosts(environ), True
        except ProbeFailed as error:
            remedy = "run it in an allocation (salloc, sbatch), or name the nodes with --hosts"
            records.append(fail("nodes", str(error), remedy))
    return Question(arguments if config else [], config, hosts, by_srun, environ), records
