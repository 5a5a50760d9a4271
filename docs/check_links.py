"""Print the links of a built site that lead nowhere, and fail if there are any: `python docs/check_links.py _docs`.

Links to other servers are counted, not followed.
"""

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "Collect the anchors and the links of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(value for name in ("id", "name") if (value := found.get(name)))
        self.links += [value for name in ("href", "src") if (value := found.get(name))]


def broken_links(site: Path) -> tuple[list[str], int, int]:
    "Return the broken links of all pages below `site`, how many links lead elsewhere, and the number of pages."
    read, broken, elsewhere = cache(Page), [], 0
    pages = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)  # templates of the theme
    for path in pages:
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                elsewhere += 1
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            lost = not target.is_file() or (
                parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).anchors
            )
            if lost:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken, elsewhere, len(pages)


if __name__ == "__main__":
    broken, elsewhere, count = broken_links(Path(sys.argv[1]).resolve())
    print(*broken, sep="\n")
    print(f"{count} pages, {len(broken)} broken links, {elsewhere} links to other servers, not followed")
    sys.exit(bool(broken))
