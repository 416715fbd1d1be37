"""`uniapl report`: the files of a run directory as one HTML page that works offline.

`train` writes the page when a run ends.
"""

from uniapl.report.page import write_report

__all__ = ["write_report"]
