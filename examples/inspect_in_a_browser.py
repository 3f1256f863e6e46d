"""Write a page that shows, token by token, which units a bundle skips, and open it in a browser.

    python examples/inspect_in_a_browser.py --open
    python examples/inspect_in_a_browser.py --bundle BUNDLE --text FILE

The page is a single file that loads nothing from elsewhere. Without --bundle, a tiny model is converted first.
"""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from tiny_llama import converted

import irc
from irc.views.routes import read_routes
from irc.views.routes_page import write_routes_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/your-own/routes.html"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--text", default=__file__, help="Text to show.  [default: this script]")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--open", action="store_true", help="Open the page in a browser.")
    arguments = parser.parse_args()
    bundle = arguments.bundle or converted()
    routes = read_routes(irc.load(bundle), arguments.text, arguments.tokens)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    facts = write_routes_page(routes, str(bundle), arguments.text, arguments.output)
    print(f"{facts['tokens']} tokens, {facts['skipped']:.3f} of the (token, unit) pairs skipped")
    for unit, share in facts["by_unit"].items():
        print(f"  {unit:<28} {share:.3f}")
    print(f"page: {arguments.output}")
    if arguments.open:
        webbrowser.open(arguments.output.resolve().as_uri())


if __name__ == "__main__":
    main()
