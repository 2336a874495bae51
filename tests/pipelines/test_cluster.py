"""Starting a cluster, joining one, using a connection that is there."""

import os

import pytest
import ray

from pipelines import cluster


def test_an_address_where_nothing_answers_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there"), cluster.connect():
        pass
    assert not ray.is_initialized()


def test_object_store_is_bounded():
    assert 128 << 20 <= cluster.default_object_store_memory() <= cluster.OBJECT_STORE_LIMIT


@pytest.mark.slow
def test_a_cluster_of_its_own_is_used_by_inner_jobs_and_shut_down(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster.connect(num_cpus=2, object_store_memory=128 << 20, env={"SEEN_BY_WORKERS": "yes"}):
        assert ray.cluster_resources()["CPU"] == 2
        with cluster.connect(num_cpus=64):
            assert ray.cluster_resources()["CPU"] == 2
        seen = ray.get(ray.remote(lambda: (os.environ.get("SEEN_BY_WORKERS"), os.getcwd())).remote())
        assert seen == ("yes", os.getcwd())
    assert not ray.is_initialized()
