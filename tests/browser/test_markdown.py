"""Answers as formatted Markdown: their elements, what is never loaded or run, and the work while they grow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from playwright.async_api import expect

from tests.api.scripted import ScriptedEngine, Step, chunk
from tests.browser.playground import Playground

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

SAMPLE = """\
## Title

Text with **bold**, *italic*, ~~deleted~~, `code` and &lt;an entity&gt;
on two lines.

```python
def long(name: str) -> str:
    return "<b>" + name
```

1. one
2. two
   - nested

> quoted

| a | b |
|---|--:|
| 1 | x<br>y |

- [x] done

![picture](https://example.com/a.png) [page](https://example.com/b) [unsafe](javascript:executed=1)
"""
# Texts whose meaning changes with what follows: each prefix of them is shown once.
GROWING = [
    SAMPLE,
    "1. a\n\n2. b\n\n10. c\n\nend\n\n3. d",
    "- a\n\n-\n\n- b\n* other\n\n  more\n\n      code",
    "para\n---\n\npara\n- item\n\n***\n\n**bold\n\nover** blocks",
    "    code\n\n    more\n\n\n    end\ntext",
    "~~~\n```\n~~~\n````md\n```js\nx\n```\n````\n",
    "a\r\n\r\nb\rc\r\n\r\n```\r\nd\r\n```\r\n\r\ne",
    "see [x] and [y][x]\n\nmore\n\nmore\n\n[x]: https://example.com 'title'\n\nend",
    "<div>\n*a*\n\n</div>\n\n<script>\nb\n\nc</script>\n\n<!-- d\n\ne -->\n\nf",
    "| a |\n|---|\n| b |\n\n| c\nd | e\n\n> a\nlazy\n\n> b\n",
    "\ta\n\n1)\tb\n\n\n\n2) c\n\n+ d\n\n\te\n\nf  \ng\\\nh",
]
GROW = """async ([text, size]) => {
    const { Markdown } = await import("/playground/markdown.js");
    const shown = (grown) => {
        const root = document.createElement("div");
        const markdown = new Markdown(root);
        for (let end = grown; end < text.length; end += grown) markdown.write(text.slice(0, end));
        markdown.write(text);
        markdown.finish(text);
        return root.innerHTML;
    };
    return [shown(size), shown(text.length)];
}"""
HOSTILE = [
    "<img src=x onerror=executed=1>",
    "<script>executed=1</script>",
    "text <svg onload=executed=1> <iframe srcdoc='<script>parent.executed=1</script>'>",
    "[a](javascript:executed=1) [b](JaVaScRiPt&colon;executed=1) [c](data:text/html,<script>executed=1</script>)",
    "[d](/health) [e](//other.example) <javascript:executed=1> [f](vbscript:x) [g](\x01javascript:executed=1)",
    "![a](https://example.com/pixel.png) ![b](javascript:executed=1) ![c](data:image/svg+xml,<svg/onload=executed=1>)",
    '[h](https://example.com/" onmouseover="executed=1) ![i](https://example.com/"onerror="executed=1)',
    "[![badge](https://example.com/badge.svg)](https://example.com) [[inner](https://a.example)](https://b.example)",
    '```"><img src=x onerror=executed=1>\n</code></pre><script>executed=1</script>\n```',
    "| <img src=x onerror=executed=1> |\n|---|\n| <script>executed=1</script> |",
    "&lt;script&gt;executed=1&lt;/script&gt; &#60;img src=x onerror=executed=1&#62;",
    "[x]: javascript:executed=1\n\n[x]",
]
ALLOWED = {
    *("A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H4", "HR", "LI", "OL", "P", "PRE", "SPAN"),
    *("STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"),
}
# The names of all elements and of all attributes, the links, and whether a script ran.
INSPECT = """() => {
    const all = [...document.querySelectorAll(".answer .text *")];
    return {
        tags: [...new Set(all.map(({ tagName }) => tagName))],
        attributes: [...new Set(all.flatMap((element) => element.getAttributeNames()))],
        links: all.filter(({ tagName }) => tagName === "A").map(({ href, rel, target }) => [href, rel, target]),
        executed: "executed" in window,
    };
}"""
# The most nodes that one of the last 100 writes adds, the number of characters that the last write parses, and whether
# the first block is the same element afterwards.
WORK = """async ([start, piece, count]) => {
    const { Markdown } = await import("/playground/markdown.js");
    const { Lexer } = await import("/playground/marked.js");
    const { lex } = Lexer.prototype;
    let parsed = 0;
    Lexer.prototype.lex = function (text) {
        parsed = text.length;
        return lex.call(this, text);
    };
    const root = document.createElement("div");
    const markdown = new Markdown(root);
    const observer = new MutationObserver(() => {});
    observer.observe(root, { childList: true, subtree: true });
    const size = (node) => 1 + (node.querySelectorAll?.("*").length ?? 0);
    const added = [];
    let text = start;
    markdown.write(text);
    const first = root.firstElementChild;
    for (let i = 0; i < count; i += 1) {
        text += piece;
        observer.takeRecords();
        markdown.write(text);
        const nodes = observer.takeRecords().flatMap(({ addedNodes }) => [...addedNodes]);
        added.push(nodes.reduce((sum, node) => sum + size(node), 0));
    }
    return { most: Math.max(...added.slice(-100)), parsed, kept: root.firstElementChild === first };
}"""
# The median time in ms in which each of the last 500 tokens is parsed, shown and laid out. A token has four characters.
TIME = """async ([start, piece, tokens]) => {
    const { Markdown } = await import("/playground/markdown.js");
    const root = document.querySelector(".turns");
    const markdown = new Markdown(root);
    const whole = start + piece.repeat(Math.ceil((tokens * 4) / piece.length));
    const times = [];
    for (let end = 4; end <= tokens * 4; end += 4) {
        const began = performance.now();
        markdown.write(whole.slice(0, end));
        root.getBoundingClientRect();
        times.push(performance.now() - began);
    }
    return times.slice(-500).sort((a, b) => a - b)[250];
}"""
PIECES = {
    "prose": "Some words with **bold** and `code`, which fill a line or two of the page.\n\n",
    "code": "    let value = compute(index); // and a comment\n",
    "list": "- item with **bold** and `code`\n",
}
STARTS = {"code": "```js\n"}


async def answer_with(playground: Playground, engine: ScriptedEngine, text: str, *more: Step) -> None:
    engine.plays(chunk([text[i : i + 7] for i in range(0, len(text), 7)], None) if more else chunk([text]), *more)
    await playground.open()
    await playground.send("hello")
    if not more:
        await playground.wait_for_answers()


async def test_an_answer_has_the_elements_of_its_markdown(scripted: Playground, engine: ScriptedEngine) -> None:
    await answer_with(scripted, engine, SAMPLE)
    text = scripted.texts
    await expect(text.locator("h4")).to_have_text("Title")
    await expect(text.locator("strong")).to_have_text("bold")
    await expect(text.locator("p").first).to_have_text(
        "Text with bold, italic, deleted, code and <an entity>on two lines."
    )
    await expect(text.locator("p br")).to_have_count(1)
    await expect(text.locator(".code pre")).to_have_text('def long(name: str) -> str:\n    return "<b>" + name')
    await expect(text.locator(".code .head span")).to_have_text("python")
    await expect(text.locator("ol > li")).to_have_count(2)
    await expect(text.locator("ol ul li")).to_have_text("nested")
    await expect(text.locator("blockquote p")).to_have_text("quoted")
    assert await text.locator("td").all_inner_texts() == ["1", "x\ny"]
    await expect(text.get_by_role("img", name="done")).to_be_visible()
    await expect(text.get_by_role("link", name="Image: picture")).to_have_attribute("href", "https://example.com/a.png")
    await expect(text.locator("p").last).to_contain_text("[unsafe](javascript:executed=1)")
    await scripted.page.reload()
    await expect(text.locator("h4")).to_have_text("Title")


async def test_a_growing_text_ends_as_the_whole_text(scripted: Playground) -> None:
    await scripted.page.goto(scripted.url)
    for text, size in itertools.product(GROWING, (1, 2, 5)):
        grown, whole = await scripted.page.evaluate(GROW, [text, size])
        assert grown == whole


async def test_an_answer_runs_no_code_and_loads_nothing(scripted: Playground, engine: ScriptedEngine) -> None:
    """`scripted` fails the test if the page sends a request to another host."""
    await answer_with(scripted, engine, "\n\n".join(HOSTILE))
    for button in await scripted.texts.get_by_role("link").all():
        await button.hover()
    found = await scripted.page.evaluate(INSPECT)
    assert set(found["tags"]) <= ALLOWED
    assert [name for name in found["attributes"] if name.startswith("on") or name in ("src", "srcdoc", "style")] == []
    assert found["links"] != []
    for href, rel, target in found["links"]:
        assert href.startswith(("https://", "mailto:")), href
        assert (rel, target) == ("noopener noreferrer", "_blank")
    assert found["executed"] is False
    await expect(scripted.texts).to_contain_text("<script>executed=1</script>")
    assert await scripted.texts.locator("a a").count() == 0


async def test_deeply_nested_text_is_shown(scripted: Playground, engine: ScriptedEngine) -> None:
    await scripted.open()
    for count, text in enumerate([">" * 5000, "- " * 2000 + "x", "[" * 3000, "**a " * 2000], 1):
        engine.plays(chunk([f"{text} the end"]))
        await scripted.send("hello")
        await scripted.wait_for_answers(count)
        await expect(scripted.texts.last).to_contain_text("the end")


@pytest.mark.parametrize("kind", PIECES)
async def test_a_long_answer_keeps_its_elements_while_it_grows(scripted: Playground, kind: str) -> None:
    await scripted.page.goto(scripted.url)
    start = "# Title\n\n" + STARTS.get(kind, "")
    found: Any = await scripted.page.evaluate(WORK, [start, PIECES[kind], 600])
    assert found["kept"]
    assert found["most"] <= 8
    assert kind != "prose" or found["parsed"] <= 4 * len(PIECES[kind])


@pytest.mark.long
@pytest.mark.parametrize("kind", PIECES)
async def test_the_last_tokens_of_a_long_answer_take_less_than_a_frame(scripted: Playground, kind: str) -> None:
    await scripted.page.goto(scripted.url)
    assert await scripted.page.evaluate(TIME, [STARTS.get(kind, ""), PIECES[kind], 4000]) < 1000 / 60


async def test_a_code_block_is_copied_and_scrolls_by_itself(scripted: Playground, engine: ScriptedEngine) -> None:
    code = "x = " + " + ".join(["value"] * 60)
    await scripted.page.set_viewport_size({"width": 390, "height": 844})
    await answer_with(scripted, engine, f"Code:\n\n```\n{code}\nend\n```\n\nAfter it.")
    pre = scripted.texts.locator("pre")
    assert await pre.evaluate("({ scrollWidth, clientWidth }) => scrollWidth > clientWidth")
    root = "document.documentElement"
    assert await scripted.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    await scripted.page.get_by_role("button", name="Copy code").click()
    await expect(scripted.texts.get_by_role("button", name="Copied")).to_be_visible()
    assert await scripted.page.evaluate("navigator.clipboard.readText()") == f"{code}\nend"
    await scripted.page.get_by_role("button", name="Copy answer").click()
    await expect(scripted.page.get_by_role("button", name="Copied")).to_have_count(2)
    assert (await scripted.page.evaluate("navigator.clipboard.readText()")).startswith("Code:\n\n```\n")


async def test_a_code_block_keeps_its_position_and_focus_while_it_grows(
    scripted: Playground, engine: ScriptedEngine
) -> None:
    line = "x = " + " + ".join(["value"] * 60)
    await answer_with(scripted, engine, f"```\n{line}\n", 0.5, chunk(["y = 1\n", "z = 2\n", "```"], start=100))
    pre = scripted.texts.locator("pre")
    await pre.focus()
    await pre.evaluate("(element) => (element.scrollLeft = 200)")
    await expect(pre).to_contain_text("z = 2")
    await scripted.wait_for_answers()
    await expect(pre).to_be_focused()
    assert await pre.evaluate("(element) => element.scrollLeft") == 200


async def test_an_answer_changes_between_tokens_and_formatted_text(
    scripted: Playground, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["**so", "**", " far"]))
    await scripted.open()
    form = scripted.page.get_by_role("button", name="Show ", exact=False).filter(has_not_text="code")
    await scripted.send("hello")
    await scripted.wait_for_answers()
    await expect(scripted.texts.locator("strong")).to_have_text("so")
    await expect(form).to_be_hidden()
    await scripted.show_tokens()
    await scripted.send("again")
    await scripted.wait_for_answers(2)
    await expect(scripted.texts.nth(1)).to_have_text("**so** far")
    await expect(scripted.texts.nth(1).locator(".token")).to_have_count(3)
    await form.click()
    await expect(scripted.texts.nth(1).locator("strong")).to_have_text("so")
    await expect(form).to_have_text("Show tokens")
    await form.click()
    await expect(scripted.texts.nth(1).locator(".token")).to_have_count(3)
