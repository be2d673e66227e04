"""The coordinator's half of the app: all of it is `ficpd.deployment.coordinator`."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from ficpd.deployment.coordinator import server_main

    server_main(grid, context)
