"""What does memory buy a small language model, per byte?

    data -> models -> inference -> evaluation -> analysis -> pipeline -> report

    reasoning_bank   dms   training   parametric   budget

The first row is the line that data flows along; the second are five published systems, which
stand on it. A folder imports only from folders below it in the contract of pyproject.toml, which
`lint-imports` checks: the systems know the line; of the line only `report`, its end, knows them.
"""

__version__ = "0.1.0"
