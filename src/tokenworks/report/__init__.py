"""The report: every Result on one self-contained HTML page, readable offline."""

from tokenworks.report.page import render, write

__all__ = ["render", "write"]
