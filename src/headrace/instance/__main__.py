"""`python -m headrace.instance`: one engine in a process of its own. A gateway starts it and talks to it."""

from headrace.instance.process import main

if __name__ == "__main__":
    raise SystemExit(main())
