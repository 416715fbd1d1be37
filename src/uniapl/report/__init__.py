"""The page of a run: what its files say, in one HTML file that needs no network.

It reads what a run directory holds and nothing else; `train` calls it when a run ends.
"""

from uniapl.report.page import write_report

__all__ = ["write_report"]
