#!/bin/sh
# Make the secrets of compose.yaml at random, in secrets/. What is there already stays.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
chmod 700 secrets

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# The folder keeps others out. The files can be read by all, since in a container another user reads them.
keep() {
    [ -e "secrets/$1" ] && return
    cat >"secrets/$1.new"
    chmod 444 "secrets/$1.new"
    mv "secrets/$1.new" "secrets/$1"
}

for name in ray_token postgres_password metrics_token grafana_password; do
    random | keep "$name"
done

# The server's file and the client's hold the same key: both are made, or none.
if [ ! -e secrets/s3_identities.json ] || [ ! -e secrets/s3_credentials ]; then
    rm -f secrets/s3_identities.json secrets/s3_credentials
    key=$(random)
    keep s3_identities.json <<END
{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": "$key"}],
  "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}
END
    keep s3_credentials <<END
[default]
aws_access_key_id = mlflow
aws_secret_access_key = $key
END
fi
