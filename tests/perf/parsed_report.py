"""Parses a report: its tags, links, headings and tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

LINK_ATTRIBUTES = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "cite", "ping"}
VOID = {"meta", "link", "br", "img", "hr", "input"}


class ParsedReport(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.unclosed: list[str] = []
        self.svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        self._text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in LINK_ATTRIBUTES]
        if tag not in VOID:
            self.unclosed.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("h1", "h2", "h3", "th", "td"):
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag
        text = " ".join("".join(self._text).split())
        if tag in ("h1", "h2", "h3"):
            self.headings.append(text)
        elif tag in ("th", "td"):
            self.tables[-1][-1].append(text)

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def rows(self, head: str) -> list[list[str]]:
        """The rows of the only table with this column."""
        (table,) = [table for table in self.tables if any(head in row for row in table[:2])]
        return table

    def row(self, head: str, name: str) -> list[str]:
        (row,) = [row for row in self.rows(head) if row[0] == name]
        return row

    def charts(self) -> list[ET.Element]:
        """The charts. Raises ParseError if one is not well-formed."""
        return [ET.fromstring(svg) for svg in self.svgs]
