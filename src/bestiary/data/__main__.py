"""`python -m bestiary.data`: fetch the corpora that have a name into the cache; what is there already stays."""

import sys

from bestiary.data.corpora import PUBLISHED
from bestiary.errors import BestiaryError


def main() -> int:
    failed = 0
    for name, corpus in PUBLISHED.items():
        try:
            print(f"{name}: {corpus.archive.fetch()}")
        except BestiaryError as error:
            failed += 1
            print(f"{name}: not fetched, tests that need it skip ({error})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
