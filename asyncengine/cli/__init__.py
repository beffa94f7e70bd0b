"""The command ``asyncengine``. Every command imports what it needs when it runs: ``--help`` loads no model code.

asyncengine chat                      talk to the embedded model
asyncengine serve ./checkpoint        OpenAI's and Anthropic's API on port 8000
asyncengine estimate ./checkpoint     what it would take to serve it
"""

from asyncengine.cli.app import application, main

__all__ = ["application", "main"]
