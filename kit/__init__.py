"""What does memory buy a small language model, per byte?

    problems -> prompts -> decode -> grade -> store -> stats -> tables, figures -> claims -> report
                           ^    ^
                 models ---+    +--- kv (activation memory)

Each module is one word of that line and imports only from modules to its left;
`lint-imports` checks it. Notebooks walk the line; `kit.pipeline` runs the notebooks.
"""

__version__ = "0.1.0"
