"""DeepSeek-V4 a second time, in plain NumPy: the yardstick the library's tests measure against.

Written from the report (arXiv 2606.19348) and the behaviour of DeepSeek's released inference code,
and sharing no line with the library. It favours the obvious form over the fast one.
"""

from tests.oracle.model import Output, forward, mtp_forward
from tests.oracle.random_weights import random_weights, tiny_config

__all__ = ["Output", "forward", "mtp_forward", "random_weights", "tiny_config"]
