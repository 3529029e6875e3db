"""Stores of files that are not this file system."""

import os

import fsspec
import pytest


@pytest.fixture
def fresh_fsspec():
    """File systems are kept by fsspec with the settings they were made with."""

    def clear():
        for cls in {fsspec.get_filesystem_class("memory"), fsspec.AbstractFileSystem}:
            cls.clear_instance_cache()

    clear()
    yield
    fsspec.filesystem("memory").store.clear()
    clear()


@pytest.fixture
def s3(monkeypatch, fresh_fsspec):
    """A local S3 server that fsspec is pointed to, and a client of it."""
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="texts")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
