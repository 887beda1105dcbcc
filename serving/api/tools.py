"""The tools of a chat request, which is taken if it lets the model call none of them.

Calls are not read out of the model's answer. So tools are not rendered either: the model would be
invited to make calls that reach the client as text.
"""

from typing import Any

from ...errors import RequestError
from .protocol import read_text, shown


def drop_tools(values: dict[str, Any]) -> None:
    """Check tools and the choice between them, in both of OpenAI's forms, and drop them."""
    for tools_key, choice_key in (("tools", "tool_choice"), ("functions", "function_call")):
        tools, choice = values.pop(tools_key, []), values.pop(choice_key, None)
        if not isinstance(tools, list):
            raise RequestError(f"{tools_key} must be a list.", param=tools_key)
        if not tools and choice not in (None, "none"):
            raise RequestError(
                f"{choice_key} is {shown(choice)} without {tools_key}; leave it out.",
                param=choice_key,
            )
        if tools and choice != "none":
            raise RequestError(
                f"{tools_key} cannot be called, because this server does not read calls out of "
                f'answers; leave {tools_key} out or send {choice_key} = "none".',
                param=tools_key,
            )
        for index, tool in enumerate(tools):
            _check_tool(f"{tools_key}[{index}]", tool, has_type=tools_key == "tools")


def _check_tool(field: str, tool: Any, has_type: bool) -> None:
    function = tool
    if has_type:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(f"{field} must be an object of the type function.", param=field)
        field, function = f"{field}.function", tool.get("function")
    if not isinstance(function, dict) or not function.get("name"):
        raise RequestError(f"{field} must be an object with a name.", param=field)
    read_text(f"{field}.name", function["name"])
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"{field}.parameters must be a JSON schema.", param=f"{field}.parameters"
        )
