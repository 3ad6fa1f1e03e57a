"""Why an engine's process has ended or could not start, told to the program that started it."""

import logging
import multiprocessing

import pytest
from vllm.config import SchedulerConfig

from vllm_cfg_plugin.compat import engine_deaths
from vllm_cfg_plugin.compat.engine_deaths import end_has_cause, report_end, serve_and_say_why_the_engine_ended
from vllm_cfg_plugin.config import new_address
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError


@pytest.fixture
def address():
    return new_address("test")


def fail(address, error, words="EngineCore failed to start."):
    """What vLLM does in the engine's process."""
    report_end(address)
    try:
        raise error
    except Exception:
        logging.getLogger("vllm.v1.engine.core").exception(words)


def failed(address, start):
    with pytest.raises(ConfigurationError) as raised, end_has_cause(address):
        start()
    return raised.value


CAUSES = [
    (ConfigurationError("cfg rank 1 could not start: no weights"), "cfg rank 1 could not start: no weights"),
    (RankDiedError("the process of cfg rank 0 ended with code -9"), "the process of cfg rank 0 ended with code -9"),
    (MemoryError("two\n  lines"), "MemoryError: two lines"),
]


@pytest.mark.parametrize(("error", "cause"), CAUSES)
def test_the_cause_is_in_the_exception(address, error, cause):
    def start():
        process = multiprocessing.get_context("fork").Process(target=fail, args=(address, error))
        process.start()
        process.join()
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    assert str(failed(address, start)) == f"the engine could not start: {cause}"


def serve(address, error):
    """A server whose engine dies, which vLLM stops as if by a signal."""
    engine_deaths._deaths.append("reported by itself")
    died = "EngineCore encountered a fatal error."
    serve_and_say_why_the_engine_ended(lambda _: error and fail(address, error, died), address, None)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RankDiedError("cfg rank 0 ended"), "the engine died: cfg rank 0 ended"),
        (None, "the engine died; the log says why"),
    ],
)
def test_a_server_whose_engine_dies_ends_with_its_cause(address, capfd, monkeypatch, error, why):
    monkeypatch.setattr(engine_deaths, "_CAUSE_MS", 500)
    process = multiprocessing.get_context("fork").Process(target=serve, args=(address, error))
    process.start()
    process.join()
    assert process.exitcode == 1
    log = capfd.readouterr().err
    assert log.splitlines()[-1] == f"vllm serve: error: {why}"
    assert "Traceback" not in log


def test_an_error_without_a_report_stays_what_it_is(address, monkeypatch):
    monkeypatch.setattr(engine_deaths, "_CAUSE_MS", 10)
    with pytest.raises(RuntimeError, match="killed"), end_has_cause(address):
        raise RuntimeError("killed")


def test_what_vllms_own_checks_refuse_is_one_line(address):
    message = str(failed(address, lambda: SchedulerConfig(max_model_len=1, is_encoder_decoder=False, max_num_seqs=0)))
    assert message.startswith("max_num_seqs: ")
    assert "\n" not in message
