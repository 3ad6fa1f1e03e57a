"""Why an engine's process could not start, told to the program that started it."""

import logging
import multiprocessing

import pytest
from vllm.config import SchedulerConfig

from vllm_cfg_plugin import compat
from vllm_cfg_plugin.compat import failed_start_has_cause, report_failed_start
from vllm_cfg_plugin.config import new_address
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError


@pytest.fixture
def address():
    return new_address("test")


def fail(address, error):
    """What vLLM does in the engine's process."""
    report_failed_start(address)
    try:
        raise error
    except Exception:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")


def failed(address, start):
    with pytest.raises(ConfigurationError) as raised, failed_start_has_cause(address):
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


def test_an_error_without_a_report_stays_what_it_is(address, monkeypatch):
    monkeypatch.setattr(compat, "_CAUSE_MS", 10)
    with pytest.raises(RuntimeError, match="killed"), failed_start_has_cause(address):
        raise RuntimeError("killed")


def test_what_vllms_own_checks_refuse_is_one_line(address):
    message = str(failed(address, lambda: SchedulerConfig(max_model_len=1, is_encoder_decoder=False, max_num_seqs=0)))
    assert message.startswith("max_num_seqs: ")
    assert "\n" not in message
