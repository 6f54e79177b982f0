"""launch.demo on the small embedded model."""

from launch import demo


def test_every_policy_answers_the_same_prompt_and_shows_its_cost(command):
    done = command(demo, "--length=700", "--policies=full;streaming_llm(budget=0.25) | int8", "--json")
    rows = done.json["rows"]
    assert [r["policy"] for r in rows] == ["full", "streaming_llm(budget=0.25) | int8"]
    assert rows[0]["cache_bytes"] == rows[0]["full_cache_bytes"]
    assert rows[1]["cache_bytes"] < 0.12 * rows[1]["full_cache_bytes"]
    assert all(r["decode_tokens_per_s"] > 0 for r in rows)
    assert done.json["prompt_tokens"] > 500
    assert "hidden: " in done.out
    assert "100.0%" in done.out


def test_bad_input_is_one_line(command):
    assert "too short" in command(demo, "--length=50").error
    assert "--policies is empty" in command(demo, "--policies=").error
