"""Broken links, missing anchors and missing files in a rendered site.

    python .ci/check_site.py FOLDER [ADDRESS]

Every `href` and `src` that stays on the site is followed: relative ones and those that begin with ADDRESS, the site's
public address. Links to other sites are not opened. Prints a line for each fault and exits with 1 where there is one.
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

class Page(HTMLParser):
    "What a page offers (ids) and what it asks for (links, images, scripts, styles)."
    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.targets, self.images = path, set(), [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(attrs[k] for k in ("id", "name") if attrs.get(k))
        self.images += tag == "img"
        if tag == "img" and not attrs.get("src"): self.targets.append((self.getpos()[0], ""))
        if attrs.get("rel") in ("canonical", "preconnect"): return
        self.targets += [(self.getpos()[0], attrs[k]) for k in ("href", "src") if attrs.get(k)]

def local_path(page, url, site, address):
    "The file that a link leads to, or None where it leaves the site."
    if address and (url == address or url.startswith(address + "/")): url = "/" + url[len(address):].lstrip("/")
    parts = urlsplit(url)
    if parts.scheme or parts.netloc: return None
    path = unquote(parts.path)
    if not path: return page.path
    target = site/path.lstrip("/") if path.startswith("/") else page.path.parent/path
    return (target/"index.html" if path.endswith("/") or target.is_dir() else target).resolve()

def fault(page, url, site, pages, address):
    "What is wrong with a link; None where it is sound."
    if not url: return "an image without a source"
    target = local_path(page, url, site, address)
    if target is None: return None
    if site not in target.parents: return f"{url} leads out of the site"
    if not target.is_file(): return f"{url} is not there"
    anchor = unquote(urlsplit(url).fragment)
    if anchor and target in pages and anchor not in pages[target].ids: return f"{url}: no such place on the page"

def check(site, address=""):
    "A line for each fault of the site, and the numbers of pages, links and images that were looked at."
    site = Path(site).resolve()
    pages = {p: Page(p) for p in sorted(site.rglob("*.html"))}
    faults = [f"{page.path.relative_to(site)}:{line}: {wrong}" for page in pages.values() for line, url in page.targets
              if (wrong := fault(page, url, site, pages, address.rstrip("/")))]
    return faults, len(pages), sum(len(p.targets) for p in pages.values()), sum(p.images for p in pages.values())

def main():
    "See the top of this file."
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    faults, n_pages, n_targets, n_images = check(*sys.argv[1:])
    print("\n".join(faults + [f"{n_pages} pages, {n_targets} links, {n_images} images: {len(faults)} faults"]))
    sys.exit(1 if faults or not n_pages else 0)

if __name__ == "__main__": main()
