BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL, 
	repository_id VARCHAR(32) NOT NULL, 
	state_id INTEGER, 
	checkpoint VARCHAR(128) NOT NULL, 
	"commit" VARCHAR(128) NOT NULL, 
	generation INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	n_bytes BIGINT NOT NULL, 
	generate_ms FLOAT NOT NULL, 
	write_ms FLOAT NOT NULL, 
	published_at DATETIME NOT NULL, 
	pruned_at DATETIME, 
	CONSTRAINT pk_adapters PRIMARY KEY (id), 
	CONSTRAINT fk_adapters_checkpoint FOREIGN KEY(checkpoint) REFERENCES checkpoints (fingerprint), 
	CONSTRAINT fk_adapters_repository_id FOREIGN KEY(repository_id) REFERENCES repositories (id) ON DELETE CASCADE, 
	CONSTRAINT fk_adapters_state_id FOREIGN KEY(state_id) REFERENCES states (id) ON DELETE SET NULL, 
	CONSTRAINT uq_adapters_repository_id_generation UNIQUE (repository_id, generation)
);
INSERT INTO "adapters" VALUES(1,'0123456789abcdef0123456789abcdef',3,'checkpoint-1','e4b95bf3c91861b416a1f8bc0e9179a309e98ac7',1,'/adapters/1','5555555555555555555555555555555555555555555555555555555555555555',1000,3.0,4.0,'2026-11-21 14:08:23.680804',NULL);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE anchors (
	id INTEGER NOT NULL, 
	repository_id VARCHAR(32) NOT NULL, 
	checkpoint VARCHAR(128) NOT NULL, 
	"commit" VARCHAR(128) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	target_commit VARCHAR(128), 
	total_commits INTEGER, 
	created_at DATETIME NOT NULL, 
	updated_at DATETIME NOT NULL, 
	CONSTRAINT pk_anchors PRIMARY KEY (id), 
	CONSTRAINT ck_anchors_role CHECK (role IN ('provisional', 'backfill', 'active', 'retired')), 
	CONSTRAINT fk_anchors_checkpoint FOREIGN KEY(checkpoint) REFERENCES checkpoints (fingerprint), 
	CONSTRAINT fk_anchors_repository_id FOREIGN KEY(repository_id) REFERENCES repositories (id) ON DELETE CASCADE, 
	CONSTRAINT uq_anchors_repository_id_checkpoint_commit UNIQUE (repository_id, checkpoint, "commit")
);
INSERT INTO "anchors" VALUES(1,'0123456789abcdef0123456789abcdef','checkpoint-1','469565b700cd79a5acce068362f9f2f27ddaa36a','active',NULL,NULL,'2026-11-21 14:08:23.660552','2026-11-21 14:08:23.660552');
CREATE TABLE checkpoints (
	fingerprint VARCHAR(128) NOT NULL, 
	encoder_fingerprint VARCHAR(128) NOT NULL, 
	name TEXT NOT NULL, 
	base_model TEXT NOT NULL, 
	config JSON NOT NULL, 
	first_used_at DATETIME NOT NULL, 
	CONSTRAINT pk_checkpoints PRIMARY KEY (fingerprint)
);
INSERT INTO "checkpoints" VALUES('checkpoint-1','encoder-1','mini','tiny','{"rank": 8}','2026-11-21 14:08:23.658322');
CREATE TABLE events (
	id INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	repository_id VARCHAR(32), 
	worktree_id INTEGER, 
	kind VARCHAR(32) NOT NULL, 
	detail JSON NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (id), 
	CONSTRAINT fk_events_repository_id FOREIGN KEY(repository_id) REFERENCES repositories (id) ON DELETE CASCADE, 
	CONSTRAINT fk_events_worktree_id FOREIGN KEY(worktree_id) REFERENCES worktrees (id) ON DELETE SET NULL
);
INSERT INTO "events" VALUES(1,'2026-11-21 14:08:23.684126','0123456789abcdef0123456789abcdef',1,'published','{"commit": "e4b95bf3c91861b416a1f8bc0e9179a309e98ac7", "generation": 1}');
CREATE TABLE failures (
	id INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	first_at DATETIME NOT NULL, 
	n_times INTEGER NOT NULL, 
	repository_id VARCHAR(32) NOT NULL, 
	worktree_id INTEGER, 
	"commit" VARCHAR(128), 
	stage VARCHAR(32) NOT NULL, 
	message TEXT NOT NULL, 
	hint TEXT, 
	resolved_at DATETIME, 
	CONSTRAINT pk_failures PRIMARY KEY (id), 
	CONSTRAINT fk_failures_repository_id FOREIGN KEY(repository_id) REFERENCES repositories (id) ON DELETE CASCADE, 
	CONSTRAINT fk_failures_worktree_id FOREIGN KEY(worktree_id) REFERENCES worktrees (id) ON DELETE SET NULL
);
INSERT INTO "failures" VALUES(1,'2026-11-21 14:08:23.687497','2026-11-21 14:08:23.687497',1,'0123456789abcdef0123456789abcdef',NULL,NULL,'embed','no',NULL,NULL);
CREATE TABLE features (
	encoder_fingerprint VARCHAR(128) NOT NULL, 
	"key" VARCHAR(128) NOT NULL, 
	n_tokens INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	blob BLOB NOT NULL, 
	CONSTRAINT pk_features PRIMARY KEY (encoder_fingerprint, "key")
);
INSERT INTO "features" VALUES('encoder-1','1577421e85056b5258f75de883f596862457e7db67b16c126ff5990d8b627e3e',10,'2026-11-21 14:08:23.664798',X'6665617475726573201577421E85056B5258F75DE883F596862457E7DB67B16C126FF5990D8B627E3E');
INSERT INTO "features" VALUES('encoder-1','771454e039d5fdcde3f5baa3add99c8bca9c2af0d3c00a8b50ffff03dda06ae4',20,'2026-11-21 14:08:23.664798',X'666561747572657320771454E039D5FDCDE3F5BAA3ADD99C8BCA9C2AF0D3C00A8B50FFFF03DDA06AE4');
CREATE TABLE repositories (
	id VARCHAR(32) NOT NULL, 
	path TEXT NOT NULL, 
	name TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	removed_at DATETIME, 
	CONSTRAINT pk_repositories PRIMARY KEY (id)
);
INSERT INTO "repositories" VALUES('0123456789abcdef0123456789abcdef','/src/0123','project','2026-11-21 14:08:23.634480',NULL);
CREATE TABLE states (
	id INTEGER NOT NULL, 
	anchor_id INTEGER NOT NULL, 
	"commit" VARCHAR(128) NOT NULL, 
	parent VARCHAR(128), 
	step INTEGER NOT NULL, 
	state_sha256 VARCHAR(64) NOT NULL, 
	diff_key VARCHAR(128), 
	n_tokens INTEGER NOT NULL, 
	n_changed_files INTEGER NOT NULL, 
	embed_ms FLOAT NOT NULL, 
	advance_ms FLOAT NOT NULL, 
	drift FLOAT, 
	committed_at DATETIME NOT NULL, 
	summary TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	state BLOB NOT NULL, 
	CONSTRAINT pk_states PRIMARY KEY (id), 
	CONSTRAINT fk_states_anchor_id FOREIGN KEY(anchor_id) REFERENCES anchors (id) ON DELETE CASCADE, 
	CONSTRAINT uq_states_anchor_id_commit UNIQUE (anchor_id, "commit")
);
INSERT INTO "states" VALUES(1,1,'469565b700cd79a5acce068362f9f2f27ddaa36a',NULL,0,'0d2f86dc1401b655668c472d4f95a53e547490e143fb7eed87c40efd1626d110',NULL,0,0,1.5,0.25,NULL,'2026-01-02 03:04:05.678901','change 0','2026-11-21 14:08:23.664798',X'8928C2D28C5915CD76C663129A23CB2FA9555979C6B03C4DC12BFD12AF1518708928C2D28C5915CD76C663129A23CB2FA9555979C6B03C4DC12BFD12AF151870');
INSERT INTO "states" VALUES(2,1,'5afee0de7b9ecb9153914e744468dad2d674f0fe','469565b700cd79a5acce068362f9f2f27ddaa36a',1,'1ebcf2cbc3f1823827eb3d544273e40ac3a62e3c110e7bf1ddbf7dca4a7b1096','1577421e85056b5258f75de883f596862457e7db67b16c126ff5990d8b627e3e',10,1,1.5,0.25,0.01,'2026-01-02 03:05:05.678901','change 1','2026-11-21 14:08:23.664798',X'1577421E85056B5258F75DE883F596862457E7DB67B16C126FF5990D8B627E3E1577421E85056B5258F75DE883F596862457E7DB67B16C126FF5990D8B627E3E');
INSERT INTO "states" VALUES(3,1,'e4b95bf3c91861b416a1f8bc0e9179a309e98ac7','5afee0de7b9ecb9153914e744468dad2d674f0fe',2,'54d87412c8173f15099dad6395b8ae91fea5682c47a4a408ad5e91d941acfa45','771454e039d5fdcde3f5baa3add99c8bca9c2af0d3c00a8b50ffff03dda06ae4',20,2,1.5,0.25,0.02,'2026-01-02 03:06:05.678901','change 2','2026-11-21 14:08:23.664798',X'771454E039D5FDCDE3F5BAA3ADD99C8BCA9C2AF0D3C00A8B50FFFF03DDA06AE4771454E039D5FDCDE3F5BAA3ADD99C8BCA9C2AF0D3C00A8B50FFFF03DDA06AE4');
CREATE TABLE worktrees (
	id INTEGER NOT NULL, 
	repository_id VARCHAR(32) NOT NULL, 
	git_dir TEXT NOT NULL, 
	path TEXT, 
	head_commit VARCHAR(128), 
	head_branch TEXT, 
	live_adapter_id INTEGER, 
	updated_at DATETIME NOT NULL, 
	CONSTRAINT pk_worktrees PRIMARY KEY (id), 
	CONSTRAINT fk_worktrees_live_adapter_id FOREIGN KEY(live_adapter_id) REFERENCES adapters (id) ON DELETE SET NULL, 
	CONSTRAINT fk_worktrees_repository_id FOREIGN KEY(repository_id) REFERENCES repositories (id) ON DELETE CASCADE, 
	CONSTRAINT uq_worktrees_git_dir UNIQUE (git_dir)
);
INSERT INTO "worktrees" VALUES(1,'0123456789abcdef0123456789abcdef','/src/.git','/src',NULL,NULL,1,'2026-11-21 14:08:23.684126');
CREATE INDEX ix_adapters_state_id ON adapters (state_id);
CREATE INDEX ix_worktrees_repository_id ON worktrees (repository_id);
CREATE INDEX ix_events_repository_id_kind ON events (repository_id, kind);
CREATE INDEX ix_failures_repository_id ON failures (repository_id);
COMMIT;
