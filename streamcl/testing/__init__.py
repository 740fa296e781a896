"""Contract checks for whoever writes a connector, a part that remembers or a plug-in; the built-in ones pass them too.

Every check raises AssertionError with the broken promise in its text. They need no test framework.

    def test_my_source_keeps_the_contract(tmp_path):
        check_source(lambda: MySource(recording), count=10)

    @pytest.mark.parametrize("check", plugin_checks(), ids=str)
    def test_my_method_keeps_the_contract(check):
        check({"kind": "my_package.my_module:MyMethod", "strength": 0.1})
"""

from streamcl.testing.connectors import check_control_log, check_sink, check_source, learned_hash
from streamcl.testing.plugins import PluginCheck, model_checks, plugin_checks
from streamcl.testing.state import check_stateful, difference, equal_states

__all__ = [
    "PluginCheck",
    "check_control_log",
    "check_sink",
    "check_source",
    "check_stateful",
    "difference",
    "equal_states",
    "learned_hash",
    "model_checks",
    "plugin_checks",
]
