"""DeepSeek-V4 once more, in plain NumPy: the reference that the library's tests compare with.

Written from the report (arXiv 2606.19348) and the behaviour of DeepSeek's released inference code.
It shares no code with the library, and prefers obvious code to fast code.
"""

from tests.oracle.model import Output, forward, mtp_forward
from tests.oracle.random_weights import random_weights, tiny_config

__all__ = ["Output", "forward", "mtp_forward", "random_weights", "tiny_config"]
