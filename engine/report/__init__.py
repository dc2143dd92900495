"""Turns the results of runs into tables, plots and a page. Every table of results is generated here, none is typed."""

from engine.report.command import main, parse, table
from engine.report.results import collect, group, published, write_lines
from engine.report.tables import markdown, replace_table, rows_of

__all__ = ["collect", "group", "main", "markdown", "parse", "published", "replace_table", "rows_of", "table", "write_lines"]
