from postgrad.doctor import compare_versions, examine


def test_every_part_of_the_machine_is_looked_at(tmp_path):
    checks = {check.name: check for check in examine(tmp_path)}
    assert list(checks) == ["python", "packages", "processor", "accelerator", "disk"]
    assert checks["python"].passed
    assert checks["accelerator"].data["threads"] >= 1
    assert isinstance(checks["accelerator"].data["bf16"], bool)
    assert checks["disk"].data["free_bytes"] > 0
    for check in checks.values():
        assert check.passed or check.remedy, check.name


def test_the_disk_of_a_folder_that_is_still_to_be_made(tmp_path):
    disk = examine(tmp_path / "not" / "yet")[-1]
    assert disk.data["path"] == str(tmp_path)


def test_versions_are_compared_with_their_ranges():
    assert compare_versions(["pytest>=7", "pytest-timeout"]).passed
    outside = compare_versions(
        ["pytest>=7,<8", "nowhere-to-be-found>=1", "pytest>99; extra == 'x'"]
    )
    assert not outside.passed
    assert "pytest" in outside.detail
    assert "is outside <8,>=7" in outside.detail
    assert "nowhere-to-be-found is missing" in outside.detail
    assert outside.failures == 2
    assert outside.remedy
